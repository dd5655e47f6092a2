//! `pipeline track`: gives what stages have measured to a tracker, after the fact. Training knows nothing of it.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};

use super::{BadRequest, Workbench, existing_store, say};
use crate::cli::{TrackArgs, Tracker};
use crate::ground::signals;
use crate::plan::history::{History, Pipeline};
use crate::plan::{self, selection};
use crate::report::mlflow::{Sent, Server};
use crate::report::scalars::{Tracked, tracked};
use crate::report::tfevents::{self, Scalar};
use crate::run::folder::is_going_on;

/// How often it is looked for new results.
const PERIOD: Duration = Duration::from_secs(2);

pub(crate) fn track(args: &TrackArgs, bench: &Workbench) -> Result<()> {
    let target = &args.target;
    let (graph, _) = bench.load_compared(target)?;
    let selection = selection::select(&graph, &target.wanted(&[]))?;
    let store = existing_store(&target.store)?;
    let name = target.file.file_stem().map_or_else(|| "pipeline".into(), |stem| stem.to_string_lossy().into_owned());
    let to = args.to.as_deref();
    let server = match args.tracker {
        Tracker::Mlflow => Some(Server::open(to, &name)?),
        Tracker::Tensorboard | Tracker::Trackio => None,
    };
    let folder = Path::new(to.unwrap_or("runs"));
    if server.is_none() && to.is_some_and(|to| to.contains("://")) {
        return Err(BadRequest("`--to` names a folder here; an address is for `mlflow`".into()).into());
    }
    let watch = signals::watch();
    loop {
        // Looked at before the results, so that what ends meanwhile is looked for once more.
        let history = History::open(&store, Pipeline::of(&target.file));
        let goes_on = args.follow && history.runs().next().is_some_and(is_going_on);
        let settled = plan::plan(&graph, &selection, bench.registry, &store)?.settled();
        let stages = tracked(&graph, &selection, &settled, &store)?;
        let sent = match &server {
            Some(server) => server.send(&stages)?,
            None => write(folder, &stages)?,
        };
        if sent.new > 0 || !goes_on {
            say(&format!("{} stages sent, {} known already\n", sent.new, sent.known))?;
        }
        if !goes_on {
            break;
        }
        watch.check()?;
        std::thread::sleep(PERIOD);
    }
    if args.tracker == Tracker::Trackio {
        let (project, folder) = (python(&name), python(&folder.display().to_string()));
        say(&format!(
            "pip install \"trackio[tensorboard]\"\npython -c \"import trackio; trackio.import_tf_events({folder}, project={project})\"\n"
        ))?;
    }
    Ok(())
}

/// A text of Python.
fn python(text: &str) -> String {
    format!("'{}'", text.replace('\\', "\\\\").replace('\'', "\\'"))
}

/// A folder for each stage, with one event file. What is there already is left, so that nothing is there twice.
fn write(folder: &Path, stages: &[Tracked]) -> Result<Sent> {
    let mut sent = Sent::default();
    for stage in stages {
        let place = folder.join(format!("{}-{}", folder_name(&stage.label), &stage.key[..12]));
        let path = place.join(format!("events.out.tfevents.0.{}", &stage.key[..16]));
        let bytes = events(stage);
        if fs::read(&path).is_ok_and(|there| there == bytes) {
            sent.known += 1;
            continue;
        }
        fs::create_dir_all(&place).with_context(|| format!("cannot make folder `{}`", place.display()))?;
        // The name of what is not whole yet is none that a reader looks for.
        let draft = place.join(format!("draft.{}", std::process::id()));
        let written = fs::write(&draft, &bytes).and_then(|()| fs::rename(&draft, &path));
        written.with_context(|| format!("cannot write `{}`", path.display()))?;
        sent.new += 1;
    }
    Ok(sent)
}

/// A label as the name of a folder: `train (base params.seed=20)` is `train-base-params.seed=20`.
fn folder_name(label: &str) -> String {
    let plain = |c: char| c.is_alphanumeric() || "-_.=".contains(c);
    label.split(|c| !plain(c)).filter(|word| !word.is_empty()).collect::<Vec<_>>().join("-")
}

fn events(stage: &Tracked) -> Vec<u8> {
    let time = stage.clock();
    let mut scalars: Vec<Scalar<'_>> = Vec::new();
    for (tag, points) in &stage.series {
        scalars.extend(points.iter().map(|(step, value)| Scalar {
            tag,
            step: *step,
            value: *value,
            time: time(*step),
        }));
    }
    scalars.sort_by_key(|scalar| scalar.step);
    tfevents::file(stage.started(), scalars)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_folders_and_of_python() {
        assert_eq!(folder_name("train (base params.seed=20)"), "train-base-params.seed=20");
        assert_eq!(folder_name("../x y/"), "..-x-y");
        assert_eq!(python("it's\\"), "'it\\'s\\\\'");
    }
}
