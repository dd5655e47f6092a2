//! What people see of results: the page, tables for papers, plots, trackers, and a run that is watched.

use std::collections::BTreeSet;
use std::fs;

use serde_json::Value as Json;

use crate::harness::{Project, wait_until};
use crate::interrupts::HELD;
use crate::runs::PROMPTKD;

/// Three variants whose answers are as bad as text can be.
fn with_answers() -> String {
    let say = r#"say: "</script><img src=x onerror=alert(1)>\u202Eevil\u0000\a end""#;
    let score = format!("  score: {{kind: evaluate, in: {{model: train.student, data: valid}}, with: {{{say}}}}}");
    let first =
        format!("  first: {{kind: evaluate, in: {{model: student0, data: valid}}, with: {{{say}, times: 40000}}}}");
    PROMPTKD
        .replace("  score: {kind: evaluate, in: {model: train.student, data: valid}}", &format!("{score}\n{first}"))
        .replace(
            "compare: [base, slow]",
            "compare: [base, slow], baseline: slow, rows: {first student: {score: first.score}}",
        )
}

/// What follows each of those beginnings, up to the next quote.
fn attributes<'p>(page: &'p str, beginning: &str) -> Vec<&'p str> {
    page.split(beginning).skip(1).filter_map(|rest| rest.split('"').next()).collect()
}

#[test]
fn a_page_says_what_was_gained_and_where_every_number_is_from() {
    let project = Project::new(&with_answers());
    project.run("run FILE --ablation seeds --variant base,slow").expect(0, &["done"]);
    project.run("report FILE --ablation seeds --variant base,slow").expect(0, &["report.html"]);
    let page = project.read("report.html");
    for said in [
        "has the best score",
        "Comparison",
        "What was measured",
        "Training",
        "Answers side by side",
        "What differs",
        "learn.rate",
        "The graph",
        "Stages",
        "pipeline run p.yaml --ablation seeds --variant base,slow",
        "--set params.seed=2",
    ] {
        assert!(page.contains(said), "`{said}` is not in the page");
    }
    let places: BTreeSet<&str> = attributes(&page, " id=\"").into_iter().collect();
    assert_eq!(places.len(), attributes(&page, " id=\"").len(), "an id is there twice");
    let links = attributes(&page, "href=\"");
    for link in &links {
        match link.strip_prefix('#') {
            Some(place) => assert!(places.contains(place), "`{link}` leads nowhere"),
            None => assert!(project.path(link).is_dir() || link.contains("trees"), "`{link}` is no file"),
        }
    }
    assert!(links.iter().filter(|link| link.starts_with("#k")).count() > 20, "{links:?}");
    // Nothing runs, nothing is fetched, and what models say is text.
    assert!(page.contains("default-src &#39;none&#39;") || page.contains("default-src 'none'"));
    for forbidden in ["<script", "<img", "onload=", "src=\"", "\u{202e}", "\u{7}", "http://", "@import", "url("] {
        let found = page.matches(forbidden).count();
        assert_eq!(found, 0, "`{forbidden}` is in the page");
    }
    assert!(page.contains("&lt;/script&gt;&lt;img src=x onerror=alert(1)&gt;\\u{202e}evil\\u{0}\\u{7} end"));
    assert!(page.contains("characters in all)"), "what is a megabyte long is cut");
    assert!(page.len() < 300_000, "{}", page.len());
    // The same results are the same bytes.
    project.run("report FILE --ablation seeds --variant base,slow -o again.html").expect(0, &[]);
    assert_eq!(project.read("again.html"), page);
}

#[test]
fn a_failed_and_an_unfinished_run_have_a_page_that_says_so() {
    let broken = "  bad: {kind: fail, in: {after: data}, with: {how: error}}\n  after: {kind: count, in: {data: bad}, with: {file: x}}\nvariants:";
    let project = Project::new(&PROMPTKD.replacen("variants:", broken, 1));
    project.run("report FILE -o none.html").expect(0, &["there is no store"]);
    let page = project.read("none.html");
    assert!(page.contains("Unfinished: ") && page.contains("Nothing to compare") && page.contains("not run"), "{page}");
    project.run("run FILE").expect(1, &["failed"]);
    project.run("report FILE").expect(0, &[]);
    let page = project.read("report.html");
    assert!(page.contains("Failed: ") && page.contains("told to fail") && page.contains("skipped"), "{page}");
    assert!(page.contains("bad.1.log"), "the words of the stage are named");
}

#[test]
fn tables_are_written_for_papers_and_for_programs() {
    let project = Project::new(&with_answers());
    project.run("run FILE --ablation seeds --variant base,slow").expect(0, &["score against slow: "]);
    let of = |format: &str| {
        project.run(&format!("compare FILE --ablation seeds --variant base,slow {format}")).expect(0, &[]).stdout
    };
    let json: Json = serde_json::from_str(&of("--format json")).unwrap();
    let difference = &json["comparison"]["differences"][0]["figures"][0];
    assert_eq!((&difference["of"], &difference["n"]), (&"repeats".into(), &3.into()));
    assert!(difference["verdict"].is_string() && difference["corrected"].is_number(), "{difference}");
    let csv = of("--format csv");
    assert_eq!(csv.lines().filter(|line| line.starts_with("repeat,base,base,")).count(), 3, "{csv}");
    // The same number, digit for digit.
    let mean = json["comparison"]["lines"][0]["figures"][0]["mean"].as_f64().unwrap();
    assert!(csv.contains(&format!("mean,base,base,,score,{mean},")), "{mean} in {csv}");
    assert!(of("--format latex").contains("\\toprule"));
    assert!(of("--transpose --format markdown").starts_with("| variant |"));
    project.run("compare FILE --columns scores").expect(2, &["has no column `scores`; it has `score`"]);
}

#[test]
fn it_is_said_how_far_what_was_measured_goes_together() {
    let report =
        "report: {metrics: {score: score.score, best: train.check.score}, correlate: score, compare: [base, slow]}";
    let project = Project::new(
        &PROMPTKD.replace("report: {metric: score.score, compare: [base, slow], seconds: [train]}", report),
    );
    project.run("run FILE --ablation seeds").expect(0, &["done"]);
    // Three cells are too few for an interval, six are not.
    let three = project.run("compare FILE --ablation seeds --variant base --format json").expect(0, &[]).stdout;
    assert_eq!(serde_json::from_str::<Json>(&three).unwrap()["comparison"]["correlations"], Json::Array(Vec::new()));
    let text = project.run("run FILE --ablation seeds --variant base,slow").expect(0, &[" with score: r "]).stdout;
    assert!(text.contains("over 6 cells"), "{text}");
}

#[test]
fn one_seed_has_the_interval_of_its_rows_and_says_nothing_of_others() {
    let project = Project::new(&with_answers());
    project
        .run("run FILE --all")
        .expect(0, &["score against slow: ", "paired bootstrap over rows", "other training seeds"]);
}

#[test]
fn a_plot_is_a_picture_that_stands_alone() {
    let project = Project::new(&with_answers());
    project.run("run FILE --ablation seeds --variant base,slow").expect(0, &[]);
    let plot = |arguments: &str| project.run(&format!("plot FILE --ablation seeds --variant base,slow {arguments}"));
    let by_variant = plot("score.score").expect(0, &[]).stdout;
    assert!(
        by_variant.starts_with("<svg ") && by_variant.contains("<title") && by_variant.contains("<metadata>of,mean,")
    );
    let curve = plot("train.learn.loss --by update").expect(0, &["<svg"]).stdout;
    assert!(curve.contains("train.learn: loss"), "{curve}");
    plot("score.score --by params.x").expect(2, &["nothing that is selected varies `params.x`"]);
    plot("nothing.score").expect(2, &["`nothing.score` is no metric"]);
    plot("").expect(2, &["name one metric"]);
}

#[test]
fn trackers_get_every_stage_once() {
    let project = Project::new(PROMPTKD);
    project.run("run FILE").expect(0, &[]);
    project.run("track tensorboard FILE --variant base --to out").expect(0, &["stages sent, 0 known already"]);
    let files = || {
        let folders = fs::read_dir(project.path("out")).unwrap().flatten();
        let files = folders.flat_map(|folder| fs::read_dir(folder.path()).unwrap().flatten());
        files.map(|file| (file.path(), fs::read(file.path()).unwrap())).collect::<BTreeSet<_>>()
    };
    let first = files();
    let has = |text: &str| first.iter().any(|(_, bytes)| bytes.windows(text.len()).any(|part| part == text.as_bytes()));
    assert!(has("brain.Event:2") && has("train.learn/loss") && has("score/score"));
    project
        .run("track trackio FILE --variant base --to out")
        .expect(0, &["0 stages sent", "trackio.import_tf_events('out'"]);
    assert_eq!(files(), first);
    project.run("track mlflow FILE --to nowhere").expect(2, &["name an MLflow server"]);
}

#[test]
fn a_run_is_watched_from_its_events_alone() {
    let project = Project::new(PROMPTKD);
    project.run("watch").expect(2, &["there is no store"]);
    let mut run = project.start("run FILE");
    wait_until("a stage has run", || {
        project.path(".pipeline/runs").is_dir() && fs::read_dir(project.path(".pipeline/runs")).unwrap().count() > 0
    });
    let watched = project.run("watch").expect(0, &["ran      train", "done: 7 ran"]);
    assert!(run.wait().unwrap().success());
    // The folder by itself is enough, on any machine.
    let folder = fs::read_dir(project.path(".pipeline/runs")).unwrap().flatten().next().unwrap().path();
    fs::rename(&folder, project.path("copied")).unwrap();
    let copied = project.run("watch copied --store nowhere").expect(0, &[]);
    assert_eq!(copied.words(), watched.words());
    project.run("watch copied --once --json").expect(0, &["\"event\":\"run_finished\""]);
}

#[test]
fn a_page_is_written_again_as_the_run_goes_on() {
    let project = Project::new(&HELD.replace("WITH", "hold: true"));
    project.write("hold", "");
    let mut run = project.start("run FILE");
    wait_until("a stage holds", || project.path("held").exists());
    let mut report = project.start("report FILE --watch");
    wait_until("there is a page", || project.path("report.html").exists());
    let page = project.read("report.html");
    assert!(page.contains("http-equiv=\"refresh\"") && page.contains("Not finished: "), "{page}");
    fs::remove_file(project.path("hold")).unwrap();
    assert!(run.wait().unwrap().success() && report.wait().unwrap().success());
    let page = project.read("report.html");
    assert!(!page.contains("http-equiv=\"refresh\"") && page.contains("have their results"), "{page}");
    // Without a run that goes on there is nothing to wait for.
    project.run("report FILE --watch -o -").expect(0, &["have their results"]);
}

#[test]
fn an_interactive_page_may_run_its_own_script_and_no_other() {
    let project = Project::new(&with_answers());
    project.run("run FILE --all").expect(0, &[]);
    let page = project.run("report FILE --all --interactive -o -").expect(0, &[]).stdout;
    let script = page.split("<script>").nth(1).and_then(|rest| rest.split("</script>").next()).unwrap();
    assert_eq!(page.matches("<script").count(), 1, "what answers say is no script");
    assert!(page.contains("script-src 'sha256-") || page.contains("script-src &#39;sha256-"), "{}", &page[..800]);
    assert!(script.starts_with("// What `report --interactive` adds") && script.contains("aria-sort"));
    assert!(page.contains("data-x=\"") && page.contains("data-value=\""));
    let plain = project.run("report FILE --all -o -").expect(0, &[]).stdout;
    assert!(!plain.contains("<script") && !plain.contains("script-src"));
}
