//! The floors of every crate, as ARCHITECTURE.md lists them: nothing stands on what is above it.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// The modules of a crate, each with the number of its floor.
type Floors = BTreeMap<String, usize>;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// `crate  low < next to-it < high`, in the block under the heading.
fn listed() -> BTreeMap<String, Floors> {
    let text = fs::read_to_string(root().join("ARCHITECTURE.md")).unwrap();
    let (_, section) = text.split_once("## Floors\n").expect("a section on floors");
    let section = section.split("\n## ").next().unwrap();
    let mut crates: BTreeMap<String, String> = BTreeMap::new();
    let mut last = String::new();
    for line in section.lines().filter(|line| line.starts_with("    ")) {
        // A line without a name goes on with the one above.
        match line[4..].split_once(' ').filter(|(name, _)| !name.is_empty()) {
            Some((name, floors)) => {
                last = name.to_owned();
                crates.insert(last.clone(), floors.to_owned());
            }
            None => crates.get_mut(&last).expect("a name first").push_str(line),
        }
    }
    let floors = |text: String| -> Floors {
        let of = |(floor, names): (usize, &str)| -> Vec<(String, usize)> {
            names.split_whitespace().map(|name| (name.to_owned(), floor)).collect()
        };
        text.split('<').enumerate().flat_map(of).collect()
    };
    crates.into_iter().map(|(name, text)| (name, floors(text))).collect()
}

fn sources(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
        if entry.is_dir() {
            found.extend(sources(&entry));
        } else if entry.extension().is_some_and(|extension| extension == "rs") {
            found.push(entry);
        }
    }
    found.sort();
    found
}

/// The modules of its own crate that a text names, outside of comments and tests.
fn named(text: &str) -> Vec<String> {
    let code = text.split("#[cfg(test)]\nmod ").next().unwrap();
    let code: String = code.lines().map(|line| line.split("//").next().unwrap()).collect::<Vec<_>>().join("\n");
    let mut names = Vec::new();
    for rest in code.split("crate::").skip(1) {
        let word = |text: &str| text.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect::<String>();
        match rest.strip_prefix('{') {
            Some(list) => names.extend(list.split('}').next().unwrap().split(',').map(|item| word(item.trim()))),
            None => names.push(word(rest)),
        }
    }
    names
}

#[test]
fn nothing_stands_on_what_is_above_it() {
    let crates = listed();
    let folders = [
        ("src", "src"),
        ("cache", "cache/src"),
        ("chart", "stages/chart/src"),
        ("contract", "stages/contract/src"),
        ("remote", "remote/src"),
        ("lm", "stages/lm/src"),
        ("stages", "stages/src"),
    ];
    let names = ["cache", "chart", "contract", "lm", "remote", "src", "stages"];
    assert!(crates.keys().map(String::as_str).eq(names), "{:?}", crates.keys());
    for (name, folder) in folders {
        let floors = &crates[name];
        let folder = root().join(folder);
        let mut seen = 0;
        for path in sources(&folder) {
            let inside = path.strip_prefix(&folder).unwrap();
            let module = inside.components().next().unwrap().as_os_str().to_str().unwrap().trim_end_matches(".rs");
            // Tests, and the ends of a crate, stand outside of the house.
            let is_test = inside.file_stem().is_some_and(|stem| stem == "tests" || stem == "testing");
            if is_test || ["lib", "main", "fake", "crash_safety"].contains(&module) {
                continue;
            }
            let Some(own) = floors.get(module) else { panic!("ARCHITECTURE.md gives `{module}` of `{name}` no floor") };
            for other in named(&fs::read_to_string(&path).unwrap()) {
                // What is no module is something that the crate publishes at its top.
                let Some(floor) = floors.get(&other) else { continue };
                seen += 1;
                assert!(floor <= own, "`{}` of `{name}` imports `{other}`, which is above it", inside.display());
            }
        }
        assert!(seen > 5, "`{name}` names {seen} modules only: is this the right folder?");
        for module in floors.keys() {
            let there = folder.join(module).is_dir() || folder.join(format!("{module}.rs")).is_file();
            assert!(there, "ARCHITECTURE.md gives `{module}` of `{name}` a floor, and it is not there");
        }
    }
}

/// The compiler says nothing of a file that no module names, and its tests are never run.
#[test]
fn every_file_is_a_module_of_its_crate() {
    // Compiled by themselves, by their path.
    let alone = ["main.rs", "lib.rs", "mod.rs", "build.rs", "fake_stages.rs"];
    let crates = ["", "cache", "remote", "stages", "stages/chart", "stages/contract", "stages/lm"];
    let folders = crates.iter().flat_map(|member| ["src", "tests/it"].map(|part| root().join(member).join(part)));
    let files: Vec<PathBuf> = folders.filter(|folder| folder.exists()).flat_map(|folder| sources(&folder)).collect();
    let texts: BTreeMap<&PathBuf, String> =
        files.iter().map(|file| (file, fs::read_to_string(file).unwrap())).collect();
    for file in files.iter().filter(|file| !alone.iter().any(|name| file.ends_with(name))) {
        let (name, folder) = (file.file_stem().unwrap().to_str().unwrap(), file.parent().unwrap());
        // A module lies beside who names it, or in a folder of that one's name.
        let declares = |(other, text): (&&PathBuf, &String)| {
            let is_near = other.parent() == Some(folder) || other.with_extension("") == folder;
            let words = [format!("mod {name};"), format!("{name}:"), format!("\"{name}.rs\"")];
            is_near && words.iter().any(|word| text.contains(word))
        };
        assert!(texts.iter().any(declares), "`{}` is compiled by nobody: name it in a `mod`", file.display());
    }
}
