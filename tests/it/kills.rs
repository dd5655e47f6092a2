//! A run is killed at any moment, again and again, and the same command ends with what an undisturbed run gives.
//!
//! `PIPELINE_KILLS=1000 cargo test --test it -- --nocapture kills::` is the long version; it prints what it saw.

use std::time::{Duration, Instant};

use contract::random;

use crate::harness::{Project, children, is_alive, wait_until};
use crate::runs::PROMPTKD;

/// Rounds of the loop in [`PROMPTKD`], each of which adds a line to a file.
const ROUNDS: usize = 24;

#[test]
fn whenever_a_run_is_killed_the_same_command_goes_on() {
    let kills: usize = std::env::var("PIPELINE_KILLS").map_or(8, |kills| kills.parse().expect("a number"));
    let undisturbed = Project::new(PROMPTKD);
    let since = Instant::now();
    undisturbed.run("run FILE --cut-every 0").expect(0, &["done: 7 ran"]);
    let whole = since.elapsed();
    let expected = undisturbed.digests("");

    let (mut projects, mut done, mut again, mut longest) = (0, 0, 0, Duration::ZERO);
    while done < kills {
        let project = Project::new(PROMPTKD);
        projects += 1;
        let mut here = 0;
        // A few kills of one run, then it is let.
        while done < kills && here < 4 {
            let mut running = project.start("run FILE --cut-every 0 --jobs 2");
            let [word, ..] = random::philox(0, [done as u32, 0, 0, 0]);
            let share = f64::from(word) / f64::from(u32::MAX);
            std::thread::sleep(whole.mul_f64(share * 0.8));
            let workers = children(running.id());
            running.kill().unwrap();
            running.wait().unwrap();
            let killed = Instant::now();
            wait_until("its workers are gone", || !workers.iter().any(|worker| is_alive(*worker)));
            longest = longest.max(killed.elapsed());
            (done, here) = (done + 1, here + 1);
        }
        let ran = project.run("run FILE --cut-every 0").expect(0, &["done: "]);
        assert!(!ran.stderr.contains("damaged") && !ran.stderr.contains("warning"), "{}", ran.stderr);
        assert_eq!(project.digests(""), expected, "after {done} kills");
        project.run("cache verify").expect(0, &["0 damaged"]);
        project.run("run FILE").expect(0, &["done: 0 ran, 7 reused"]);
        let left = std::fs::read_dir(project.path(".pipeline/work")).unwrap().count();
        assert_eq!(left, 0, "work folders are left");
        let rounds = project.lines("rounds.txt");
        assert!(
            rounds <= ROUNDS + 2 * here,
            "{rounds} rounds for {ROUNDS}, of which {here} kills cost one each or two"
        );
        again += rounds - ROUNDS;
    }
    assert!(longest < Duration::from_secs(2), "workers lived on for {longest:?}");
    println!(
        "{done} kills in {projects} runs: 0 wrong results, 0 damaged files, 0 orphans after {longest:?}, {again} rounds made again"
    );
}
