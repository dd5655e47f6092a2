//! `pipeline completions`: what a shell needs to complete command lines, with the names of stages, variants and parameters.
//!
//! The script that a shell reads asks this program for every word, so that it never has to be made anew. What is asked is answered
//! from the text of the pipeline alone, also while something is wrong with it.

use std::path::Path;

use anyhow::Result;
use clap::{ArgAction, Command as Clap, CommandFactory};

use super::{Workbench, say};
use crate::cli::{Cli, Shell};
use crate::language::{Outline, outline};

/// Prints the script of a shell.
pub(crate) fn completions(shell: Shell) -> Result<()> {
    say(match shell {
        Shell::Bash => {
            "_pipeline() {\n    local IFS=$'\\n'\n    COMP_WORDBREAKS=${COMP_WORDBREAKS//=/}\n    \
             COMPREPLY=($(\"${COMP_WORDS[0]}\" complete -- \"${COMP_WORDS[@]:1:COMP_CWORD}\" 2>/dev/null))\n}\n\
             complete -o default -o nospace -F _pipeline pipeline\n"
        }
        Shell::Zsh => {
            "#compdef pipeline\n_pipeline() {\n    local -a found\n    \
             found=(\"${(@f)$(\"${words[1]}\" complete -- \"${(@)words[2,CURRENT]}\" 2>/dev/null)}\")\n    \
             [[ -n \"$found\" ]] && compadd -S '' -- \"${found[@]}\" || _files\n}\ncompdef _pipeline pipeline\n"
        }
        Shell::Fish => {
            "function __pipeline\n    set -l words (commandline -opc) (commandline -ct)\n    \
             $words[1] complete -- $words[2..-1] 2>/dev/null\nend\ncomplete -c pipeline -a '(__pipeline)'\n"
        }
    })
}

/// Prints what the last word may become, a line each.
pub(crate) fn complete(words: &[String], bench: &Workbench) -> Result<()> {
    let found = candidates(words, &Cli::command(), &|file| outline(file, bench.shipped), bench.shipped);
    say(&found.iter().map(|word| format!("{word}\n")).collect::<String>())
}

fn candidates(
    words: &[String],
    cli: &Clap,
    outline: &dyn Fn(&Path) -> Option<Outline>,
    shipped: &[(&str, &str)],
) -> Vec<String> {
    let Some((last, before)) = words.split_last() else { return Vec::new() };
    let mut command = cli;
    let mut given: Vec<&String> = Vec::new();
    let mut waits: Option<String> = None;
    for word in before {
        if waits.take().is_some() {
            continue;
        }
        match word.strip_prefix("--") {
            Some(flag) if takes_value(command, flag) => waits = Some(flag.to_owned()),
            Some(_) => {}
            None => match command.find_subcommand(word) {
                Some(inner) if given.is_empty() => command = inner,
                _ => given.push(word),
            },
        }
    }
    let places = command.get_positionals().map(|positional| positional.get_id().as_str()).collect::<Vec<_>>();
    let at = |name: &str| places.iter().position(|place| *place == name);
    let about = at("file").and_then(|place| given.get(place)).and_then(|file| outline(Path::new(file.as_str())));
    let about = about.unwrap_or_default();
    let found: Vec<String> = match waits.as_deref() {
        Some("variant") => with_list(last, about.variants),
        Some("against") => about.variants,
        Some("profile") => about.profiles,
        Some("ablation") => about.ablations,
        Some("until" | "force") => with_list(last, about.stages),
        Some("set") => about.settings.into_iter().map(|path| path + "=").collect(),
        Some(flag) => values(command, flag),
        None if last.starts_with('-') => flags(command),
        None if command.has_subcommands() => visible(command),
        None => match places.get(given.len().min(places.len().saturating_sub(1))) {
            Some(&"file") if given.len() == at("file").unwrap_or_default() => files(shipped),
            Some(&"stages") => about.stages,
            _ => Vec::new(),
        },
    };
    let mut found: Vec<String> = found.into_iter().filter(|word| word.starts_with(last.as_str())).collect();
    found.dedup();
    found
}

/// Several with commas: what was written before the last comma stays.
fn with_list(word: &str, names: Vec<String>) -> Vec<String> {
    let head = word.rfind(',').map_or("", |comma| &word[..=comma]);
    names.into_iter().map(|name| format!("{head}{name}")).collect()
}

fn takes_value(command: &Clap, flag: &str) -> bool {
    let takes = |action: &ArgAction| matches!(action, ArgAction::Set | ArgAction::Append);
    command.get_arguments().any(|argument| argument.get_long() == Some(flag) && takes(argument.get_action()))
}

fn values(command: &Clap, flag: &str) -> Vec<String> {
    let argument = command.get_arguments().find(|argument| argument.get_long() == Some(flag));
    let values = argument.map(|argument| argument.get_possible_values()).unwrap_or_default();
    values.iter().map(|value| value.get_name().to_owned()).collect()
}

fn flags(command: &Clap) -> Vec<String> {
    let shown = command.get_arguments().filter(|argument| !argument.is_hide_set());
    shown.filter_map(|argument| Some(format!("--{}", argument.get_long()?))).collect()
}

fn visible(command: &Clap) -> Vec<String> {
    let shown = command.get_subcommands().filter(|inner| !inner.is_hide_set());
    shown.map(|inner| inner.get_name().to_owned()).collect()
}

/// Pipelines in this folder, in `pipelines/` and among the shipped ones.
fn files(shipped: &[(&str, &str)]) -> Vec<String> {
    let here =
        [".", "pipelines"].into_iter().flat_map(|folder| Path::new(folder).read_dir().into_iter().flatten().flatten());
    let names = here.filter_map(|entry| entry.file_name().into_string().ok()).filter(|name| name.ends_with(".yaml"));
    let mut names: Vec<String> = names.chain(shipped.iter().map(|(name, _)| (*name).to_owned())).collect();
    names.sort_unstable();
    names.dedup();
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    fn completed(line: &str) -> String {
        let words: Vec<String> = line.split(' ').map(str::to_owned).collect();
        let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        let about = Outline {
            stages: names(&["data", "train", "train.learn"]),
            variants: names(&["base", "kd", "no-prompt"]),
            profiles: names(&["cpu"]),
            ablations: names(&["seeds"]),
            settings: names(&["params.seed", "train.learn"]),
        };
        let outline = |file: &Path| (file == Path::new("p.yaml")).then(|| about.clone());
        candidates(&words, &Cli::command(), &outline, &[("zzz.yaml", "")]).join(" ")
    }

    #[test]
    fn words_are_completed_by_where_they_stand() {
        for (line, expected) in [
            ("wh", "why"),
            ("run zz", "zzz.yaml"),
            ("run p.yaml t", "train train.learn"),
            ("run p.yaml data t", "train train.learn"),
            ("run p.yaml --variant n", "no-prompt"),
            ("run p.yaml --variant base,k", "base,kd"),
            ("run --jobs 2 p.yaml --set params.", "params.seed="),
            ("run p.yaml --fail", "--fail-fast"),
            ("run p.yaml --profile ", "cpu"),
            ("compare p.yaml --ablation s", "seeds"),
            ("tag best p.yaml d", "data"),
            ("graph p.yaml --format d", "dot"),
            ("cache v", "verify"),
            ("run other.yaml t", ""),
            ("", "run"),
        ] {
            let found = completed(line);
            assert!(found == expected || line.is_empty() && found.starts_with("run "), "{line}: {found}");
        }
        assert!(!completed("").contains("worker") && !completed("").contains("complete "), "what is hidden stays so");
    }
}
