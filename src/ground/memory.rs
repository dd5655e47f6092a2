//! How much memory a process of this program can have.

use std::fs;
use std::path::Path;

use rustix::process::{Resource, getrlimit};

/// The most bytes that a process may hold: what the machine has, its control group allows and `ulimit` leaves. `None` where
/// nothing says.
pub(crate) fn limit() -> Option<u64> {
    let machine = fs::read_to_string("/proc/meminfo").ok().and_then(|text| field(&text, "MemTotal:"));
    let own = [Resource::As, Resource::Data].into_iter().filter_map(|resource| getrlimit(resource).current);
    machine.into_iter().chain(group_limits()).chain(own).min()
}

/// The field of `/proc/meminfo`, in bytes.
fn field(text: &str, name: &str) -> Option<u64> {
    let kibibytes = text.lines().find_map(|line| line.strip_prefix(name))?;
    Some(kibibytes.trim().trim_end_matches("kB").trim().parse::<u64>().ok()? << 10)
}

/// What the control groups above this process allow, in version 2 and 1. Inside of a container its own is the root.
fn group_limits() -> Vec<u64> {
    let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let mut limits = Vec::new();
    for (root, file, path) in own.lines().filter_map(hierarchy) {
        for folder in Path::new(path.trim_start_matches('/')).ancestors() {
            let text = fs::read_to_string(Path::new(root).join(folder).join(file)).unwrap_or_default();
            limits.extend(text.trim().parse::<u64>()); // `max` where there is no limit
        }
    }
    limits
}

/// Where a line of `/proc/self/cgroup` says that memory is limited: root, name of the file, path below the root.
fn hierarchy(line: &str) -> Option<(&'static str, &'static str, &str)> {
    let (_, rest) = line.split_once(':')?;
    match rest.split_once(':')? {
        ("", path) => Some(("/sys/fs/cgroup", "memory.max", path)),
        (controllers, path) if controllers.split(',').any(|name| name == "memory") => {
            Some(("/sys/fs/cgroup/memory", "memory.limit_in_bytes", path))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_system_says_is_understood() {
        assert_eq!(field("MemTotal:       24602832 kB\nMemFree:  1 kB\n", "MemTotal:"), Some(24_602_832 << 10));
        assert_eq!(hierarchy("0::/user.slice"), Some(("/sys/fs/cgroup", "memory.max", "/user.slice")));
        let old = "4:cpu,memory:/job/7";
        assert_eq!(hierarchy(old), Some(("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "/job/7")));
        assert_eq!(hierarchy("3:cpuset:/"), None);
    }

    #[test]
    fn this_machine_has_some() {
        if Path::new("/proc/meminfo").exists() {
            assert!(limit().is_some_and(|bytes| bytes > 16 << 20), "{:?}", limit());
        }
    }
}
