//! Attempts with an executor that starts no process.

use std::fs;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};

use contract::Conventions;
use tempfile::TempDir;

use super::*;
use crate::fakes;
use crate::graph::{Operator, Subgraph};
use crate::ground::trouble::Fault;
use crate::plan::key;

/// What a worker would do: reads the job, says something, hears orders, ends.
type Act = fn(&Job, &mut dyn FnMut(Message), &Receiver<Order>) -> Ending;

/// An order as it reaches the worker.
#[derive(Debug, PartialEq)]
enum Order {
    Stop,
    Kill,
}

/// An executor in this process.
struct InProcess {
    act: Act,
    started: AtomicUsize,
}

struct Acting {
    job: Job,
    act: Act,
    orders: Receiver<Order>,
    told: Arc<Told>,
}

struct Told(Sender<Order>);

impl Executor for InProcess {
    fn claim(&self, _: &str) -> Result<Option<Claim>> {
        Ok(Some(Box::new(())))
    }

    fn start(&self, job: Job, _: &Path) -> Result<Box<dyn Running>> {
        self.started.fetch_add(1, Ordering::Relaxed);
        let (sender, orders) = mpsc::channel();
        Ok(Box::new(Acting { job, act: self.act, orders, told: Arc::new(Told(sender)) }))
    }
}

impl Running for Acting {
    fn control(&self) -> Arc<dyn Control> {
        Arc::clone(&self.told) as Arc<dyn Control>
    }

    fn wait(self: Box<Self>, say: &mut dyn FnMut(Message)) -> Result<Ending> {
        Ok((self.act)(&self.job, say, &self.orders))
    }
}

impl Control for Told {
    fn stop(&self) {
        let _ = self.0.send(Order::Stop);
    }

    fn kill(&self) {
        let _ = self.0.send(Order::Kill);
    }
}

/// A store, and a stage that reads a file.
struct Bench {
    folder: TempDir,
    store: Arc<Store>,
    executor: Arc<InProcess>,
    orders: Arc<Orders>,
}

impl Bench {
    fn new(act: Act) -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("numbers.txt"), "7\n").unwrap();
        let store = Arc::new(Store::open(&folder.path().join("store")).unwrap());
        let executor = Arc::new(InProcess { act, started: AtomicUsize::new(0) });
        Bench { folder, store, executor, orders: Arc::default() }
    }

    fn source(&self) -> PathBuf {
        self.folder.path().join("numbers.txt")
    }

    fn action(&self) -> Action {
        let registry = fakes::registry();
        let kind = registry.get("read-rows").unwrap();
        let config = kind.resolve(&json!({"path": self.source()}), Conventions::Sound).unwrap();
        let ports = kind.ports(&config);
        let operator = Operator { kind: "read-rows".into(), config, ports, places: BTreeMap::new() };
        let mut digest = |source: &contract::Source| crate::plan::content::of(source, &self.store);
        key::action(&Subgraph::Operator(operator), &BTreeMap::new(), &registry, &mut digest).unwrap()
    }

    /// Attempts it once: what was said, and how it ended. `at_start` is done when the worker has started.
    fn attempt(&self, at_start: impl Fn(&Orders)) -> (Vec<Message>, Ended) {
        let (sender, updates) = mpsc::channel();
        let attempt = Attempt {
            stage: "read".into(),
            action: self.action(),
            inputs: BTreeMap::new(),
            again: false,
            store: Arc::clone(&self.store),
            slot: Slot { device: "cpu".into(), threads: 1, memory: 0 },
            cut_seconds: 60.0,
            executor: Arc::clone(&self.executor) as Arc<dyn Executor>,
            log: self.folder.path().join("log"),
            say: Box::new(move |update| sender.send(update).unwrap()),
            orders: Arc::clone(&self.orders),
        };
        attempt.spawn().unwrap();
        let mut said = Vec::new();
        for update in updates {
            match update {
                Update::Waiting => panic!("nobody else has the lock"),
                Update::Started => at_start(&self.orders),
                Update::Said(message) => said.push(message),
                Update::Ended(ended) => return (said, ended),
            }
        }
        panic!("it never ended")
    }

    fn started(&self) -> usize {
        self.executor.started.load(Ordering::Relaxed)
    }

    /// Whether nothing was published, and no work folder is left.
    fn is_untouched(&self) -> bool {
        let work = fs::read_dir(self.folder.path().join("store/work")).unwrap();
        self.store.record(&self.action().key).unwrap().is_none() && work.count() == 0
    }
}

#[test]
fn what_the_worker_left_is_published_and_what_it_said_is_handed_on() {
    let bench = Bench::new(|job, say, _| {
        let output = |name: &str| job.work.join("outputs").join(name);
        fs::create_dir_all(output("data")).unwrap();
        fs::create_dir_all(output("metrics")).unwrap();
        fs::write(output("data").join("rows"), "seven").unwrap();
        fs::write(output("metrics").join("metrics.json"), r#"{"score": 0.5}"#).unwrap();
        let copy = job.work.join("sources").join("0");
        say(Message::Noted { part: None, text: format!("`{}` has one row", copy.display()) });
        let outputs = vec![("data".into(), PortType::Dataset), ("metrics".into(), PortType::Metrics)];
        Ending::Told(Outcome::Done { outputs, facts: BTreeMap::new(), seconds: 1.5, rounds: None })
    });
    let (said, ended) = bench.attempt(|_| {});
    let [Message::Noted { part: None, text }] = said.as_slice() else { panic!("{said:?}") };
    assert_eq!(*text, format!("`{}` has one row", bench.source().display()), "a copy is called as the person wrote it");
    let Ended::Ran(record, metrics) = ended else { panic!("it did not run") };
    assert_eq!(metrics["score"], json!(0.5));
    assert_eq!((&record.info["seconds"], &record.info["device"]), (&json!(1.5), &json!("cpu")));
    let folder = bench.store.open_artifact(&record.outputs["data"]).unwrap();
    assert_eq!(fs::read_to_string(folder.join("rows")).unwrap(), "seven");

    let (_, again) = bench.attempt(|_| panic!("nothing is started for a result that is there"));
    assert!(matches!(again, Ended::Reused(same, _) if same == record));
    assert_eq!(bench.started(), 1);
}

#[test]
fn a_failure_says_who_is_to_blame() {
    let full = "the disk is full";
    let said = |_: &Job, _: &mut dyn FnMut(Message), _: &Receiver<Order>| {
        Ending::Told(Outcome::Failed { fault: Fault::Disk, text: "the disk is full".into() })
    };
    let died = |_: &Job, _: &mut dyn FnMut(Message), _: &Receiver<Order>| {
        Ending::Died(Blamed { fault: Fault::Memory, text: "the disk is full".into() })
    };
    for (act, fault) in [(said as Act, Fault::Disk), (died, Fault::Memory)] {
        let bench = Bench::new(act);
        let (_, Ended::Failed(error)) = bench.attempt(|_| {}) else { panic!("it should have failed") };
        assert_eq!((Fault::of(&error), error.to_string().as_str()), (fault, full));
        assert!(bench.is_untouched());
    }
}

#[test]
fn an_order_to_stop_reaches_the_worker_and_is_no_failure() {
    let stops = |_: &Job, _: &mut dyn FnMut(Message), orders: &Receiver<Order>| {
        assert_eq!(orders.recv().unwrap(), Order::Stop);
        Ending::Told(Outcome::Stopped)
    };
    let dies = |_: &Job, _: &mut dyn FnMut(Message), orders: &Receiver<Order>| {
        assert_eq!(orders.recv().unwrap(), Order::Kill);
        Ending::Died(Blamed { fault: Fault::Memory, text: "killed".into() })
    };
    for (act, order) in [(stops as Act, Orders::stop as fn(&Orders)), (dies, Orders::kill)] {
        let bench = Bench::new(act);
        assert!(!bench.orders.has_begun());
        let (_, ended) = bench.attempt(|orders| {
            assert!(orders.has_begun());
            order(orders);
        });
        assert!(matches!(ended, Ended::Stopped));
        assert!(bench.is_untouched());
    }
}

#[test]
fn what_was_told_to_stop_before_it_began_never_begins() {
    let bench = Bench::new(|_, _, _| panic!("it was told to stop"));
    bench.orders.stop();
    let (_, ended) = bench.attempt(|_| panic!("it was told to stop"));
    assert!(matches!(ended, Ended::Stopped));
    assert_eq!(bench.started(), 0);
    assert!(bench.is_untouched() && !bench.orders.has_begun());
}

#[test]
fn a_source_that_changed_is_named() {
    let bench = Bench::new(|job, _, _| {
        let [(source, _)] = job.sources.as_slice() else { panic!("one source is in the key") };
        Ending::Told(Outcome::Changed { source: source.at.local().unwrap().to_owned() })
    });
    let (_, Ended::Changed { source }) = bench.attempt(|_| {}) else { panic!("the file has changed") };
    assert_eq!(source, bench.source());
    assert!(bench.is_untouched());
}
