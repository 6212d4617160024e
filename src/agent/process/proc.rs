//! What the system says of a process, in `/proc`.

use std::fs;

/// The fields of `/proc/PID/stat` from the state on: the name before them may hold anything.
fn fields(stat: &str) -> impl Iterator<Item = &str> {
    stat.rsplit_once(')').map_or("", |(_, rest)| rest).split_ascii_whitespace()
}

/// The process's start, in ticks since the machine's, from `/proc/PID/stat`: with its number it names one process and
/// no later one.
#[must_use]
pub fn start_of(stat: &str) -> Option<u64> {
    fields(stat).nth(19)?.parse().ok()
}

/// The number of the process's parent, from `/proc/PID/stat`.
#[must_use]
pub fn parent_of(stat: &str) -> Option<i32> {
    fields(stat).nth(1)?.parse().ok()
}

fn stat(pid: i32) -> Option<String> {
    fs::read_to_string(format!("/proc/{pid}/stat")).ok()
}

/// When the process of this number started, while it runs. One that has ended and was not waited for does not run.
pub(super) fn started(pid: i32) -> Option<u64> {
    let stat = stat(pid)?;
    let runs = fields(&stat).next().is_some_and(|state| !matches!(state, "Z" | "X" | "x"));
    runs.then(|| start_of(&stat)).flatten()
}

/// Every process that there is.
fn all() -> impl Iterator<Item = i32> {
    fs::read_dir("/proc").into_iter().flatten().flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

/// The processes of the session that the process of this number began, while they run.
pub(super) fn session(leader: i32) -> Vec<i32> {
    let in_it = |pid: &i32| {
        started(*pid).is_some() && stat(*pid).and_then(|stat| fields(&stat).nth(3)?.parse().ok()) == Some(leader)
    };
    all().filter(in_it).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_parentheses_hides_nothing() {
        let stat = "42 (a) b (c) S 7 42 42 0 -1 4194304 1 0 0 0 1 2 0 0 20 0 1 0 98765 1 2 3";
        assert_eq!((parent_of(stat), start_of(stat)), (Some(7), Some(98765)));
        assert_eq!((parent_of(""), start_of("nonsense)")), (None, None));
    }

    #[test]
    fn this_process_runs_and_one_that_is_not_there_does_not() {
        let me = i32::try_from(std::process::id()).expect("a number");
        assert!(started(me).is_some() && started(i32::MAX).is_none());
    }
}
