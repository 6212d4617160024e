//! A server's memory, from `/proc`: that of a process and of all below it. Of a server that the agent did not start the
//! process is found by the port that it listens on.
//!
//! The rule of this module: what can't be read for certain is not told.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::{Path, PathBuf},
};

use crate::{
    domain::memory::Bytes,
    ports::{Footprint, ServerProcess},
};

/// The most that is read of one of its files.
const LARGEST: usize = 64 << 20;

/// Fields of `/proc/PID/stat`, counted from behind the name.
const PARENT: usize = 1;
const SESSION: usize = 3;
const START: usize = 19;
/// How the command of a shim begins, as agents run it.
const SHIM: &str = "wharf\0shim\0";

/// The server that listens on a port of this machine.
#[derive(Clone, Debug)]
pub struct Listening {
    port: u16,
    proc: Proc,
}

impl Listening {
    /// Whoever listens on `port` when it is asked for.
    #[must_use]
    pub fn on(port: u16) -> Self {
        Self { port, proc: Proc::default() }
    }

    /// The server at `address`, `http://host:port` or `host:port`, if that is on this machine.
    #[must_use]
    pub fn at(address: &str) -> Option<Self> {
        let address = address.trim_end_matches('/');
        let address = address.strip_prefix("http://").unwrap_or(address);
        let (host, port) = address.rsplit_once(':')?;
        let loopback = matches!(host, "localhost" | "[::1]") || host.starts_with("127.");
        loopback.then(|| port.parse().ok().map(Self::on)).flatten()
    }

    /// The first of the processes that have the listening socket: the others are its children.
    fn process(&self, parents: &BTreeMap<u32, u32>) -> Option<u32> {
        let holders = self.holders(parents);
        holders.iter().copied().find(|process| parents.get(process).is_none_or(|parent| !holders.contains(parent)))
    }

    /// Who listens in the place of the program whose first process is `root`, if it can be said for certain that it is
    /// none of that program: it is not below `root` nor of its session, and it was there before `root`, or is below
    /// another `wharf shim`. Who came later and is nobody's may be what the program had others start, as a container is.
    #[must_use]
    pub fn usurper(&self, root: u32) -> Option<u32> {
        let parents = self.proc.parents();
        let process = self.process(&parents)?;
        let above = |process: u32| {
            // No deeper than there are processes.
            std::iter::successors(Some(process), |process| parents.get(process).copied()).take(parents.len())
        };
        if above(process).any(|process| process == root) || self.proc.field(process, SESSION) == Some(u64::from(root)) {
            return None;
        }
        let earlier = self.proc.field(process, START)? < self.proc.field(root, START)?;
        let another = above(process).any(|process| {
            read(&self.proc.0.join(process.to_string()).join("cmdline")).is_ok_and(|line| line.starts_with(SHIM))
        });
        (earlier || another).then_some(process)
    }

    /// The processes that have the listening socket.
    fn holders(&self, parents: &BTreeMap<u32, u32>) -> BTreeSet<u32> {
        let proc = &self.proc.0;
        let sockets: BTreeSet<String> = ["net/tcp", "net/tcp6"]
            .into_iter()
            .filter_map(|file| read(&proc.join(file)).ok())
            .flat_map(|table| listening(&table, self.port))
            .map(|inode| format!("socket:[{inode}]"))
            .collect();
        if sockets.is_empty() {
            return BTreeSet::new();
        }
        let holds = |process: &u32| {
            let Ok(files) = fs::read_dir(proc.join(process.to_string()).join("fd")) else { return false };
            files.flatten().any(|file| {
                fs::read_link(file.path()).is_ok_and(|to| to.to_str().is_some_and(|to| sockets.contains(to)))
            })
        };
        parents.keys().copied().filter(holds).collect()
    }
}

impl ServerProcess for Listening {
    fn footprint(&self) -> Option<Footprint> {
        let parents = self.proc.parents();
        let process = self.process(&parents)?;
        let bytes = self.proc.with_all_below(process, &parents)?;
        Some(Footprint { run: u64::from(process), bytes, empty: None })
    }
}

/// Where the system tells of its processes.
#[derive(Clone, Debug)]
pub(super) struct Proc(PathBuf);

impl Default for Proc {
    fn default() -> Self {
        Self(PathBuf::from("/proc"))
    }
}

impl Proc {
    /// The memory of the process and of all that it and they started, while it runs. Blocks.
    pub(super) fn whole(&self, process: u32) -> Option<Bytes> {
        self.with_all_below(process, &self.parents())
    }

    /// The memory of all that the process and they started, if there is any. Blocks.
    pub(super) fn below(&self, process: u32) -> Option<Bytes> {
        let parents = self.parents();
        let family = family(process, &parents);
        self.sum(family.get(1..).filter(|below| !below.is_empty())?)
    }

    fn with_all_below(&self, process: u32, parents: &BTreeMap<u32, u32>) -> Option<Bytes> {
        self.sum(&family(process, parents))
    }

    /// The memory of the first, and of those of the others that run still: one that has ended has none.
    fn sum(&self, processes: &[u32]) -> Option<Bytes> {
        let (first, others) = processes.split_first()?;
        let others = others.iter().map(|one| self.anonymous(*one).unwrap_or_default());
        others.fold(self.anonymous(*first), |sum, bytes| sum?.checked_add(bytes)).map(Bytes)
    }

    /// Every process and its parent.
    fn parents(&self) -> BTreeMap<u32, u32> {
        let Ok(entries) = fs::read_dir(&self.0) else { return BTreeMap::new() };
        let processes = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
        processes.filter_map(|process| Some((process, self.parent(process)?))).collect()
    }

    fn parent(&self, process: u32) -> Option<u32> {
        self.field(process, PARENT)?.try_into().ok()
    }

    /// A number of `/proc/PID/stat`.
    fn field(&self, process: u32, field: usize) -> Option<u64> {
        let stat = read(&self.0.join(process.to_string()).join("stat")).ok()?;
        // The name, in brackets, may hold anything.
        stat.rsplit_once(')')?.1.split_whitespace().nth(field)?.parse().ok()
    }

    fn anonymous(&self, process: u32) -> Option<u64> {
        let folder = self.0.join(process.to_string());
        let kibibytes = |file: &str, fields: [&str; 2]| {
            let text = read(&folder.join(file)).ok()?;
            let field = |name: &str| {
                let line = text.lines().find_map(|line| line.strip_prefix(name))?;
                line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()
            };
            field(fields[0])?.checked_add(field(fields[1])?)
        };
        // Proportional where the system tells it: what workers share counts once.
        let found = kibibytes("smaps_rollup", ["Pss_Anon:", "Pss_Shmem:"])
            .or_else(|| kibibytes("status", ["RssAnon:", "RssShmem:"]))?;
        found.checked_mul(1024)
    }
}

/// The process, then all that it and they started.
fn family(process: u32, parents: &BTreeMap<u32, u32>) -> Vec<u32> {
    let mut family = vec![process];
    let mut at = 0;
    while let Some(parent) = family.get(at).copied() {
        at += 1;
        family
            .extend(parents.iter().filter(|(child, of)| **of == parent && **child != parent).map(|(child, _)| *child));
    }
    family
}

/// The sockets of `table` that listen on `port`.
fn listening(table: &str, port: u16) -> Vec<String> {
    const LISTEN: &str = "0A";
    let socket = |line: &str| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let (local, state, inode) = (fields.get(1)?, fields.get(3)?, fields.get(9)?);
        let at = u16::from_str_radix(local.rsplit_once(':')?.1, 16).ok()?;
        (at == port && *state == LISTEN).then(|| (*inode).to_owned())
    };
    table.lines().skip(1).filter_map(socket).collect()
}

fn read(path: &Path) -> io::Result<String> {
    use io::Read as _;
    let mut text = String::new();
    fs::File::open(path)?.take(LARGEST as u64).read_to_string(&mut text)?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_addresses_of_this_machine_have_a_process_here() {
        let port = |address| Listening::at(address).map(|found| found.port);
        assert_eq!(port("http://127.0.0.1:8080/"), Some(8080));
        assert_eq!(port("localhost:1"), Some(1));
        assert_eq!(port("http://[::1]:9"), Some(9));
        assert_eq!(port("http://triton-0:8000"), None);
        assert_eq!(port("127.0.0.1"), None);
    }

    #[test]
    fn the_process_that_listens_is_found_with_its_children_and_nobody_else() {
        let folder = tempfile::tempdir().expect("a folder");
        let root = folder.path();
        fs::create_dir(root.join("net")).expect("net");
        let table = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n\
            0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1000        0 77 1\n\
            1: 0100007F:1F90 0100007F:C000 01 00000000:00000000 00:00000000 00000000  1000        0 78 1\n";
        fs::write(root.join("net/tcp"), table).expect("tcp");
        let process = |id: u32, parent: u32, kib: u64, inode: u32| {
            let folder = root.join(id.to_string());
            fs::create_dir_all(folder.join("fd")).expect("fd");
            fs::write(folder.join("stat"), format!("{id} (a) b) S {parent} 1 1")).expect("stat");
            fs::write(folder.join("status"), format!("Name:\ta\nRssAnon:\t {kib} kB\nRssShmem:\t 1 kB\n"))
                .expect("status");
            std::os::unix::fs::symlink(format!("socket:[{inode}]"), folder.join("fd/3")).expect("fd");
        };
        process(10, 1, 100, 78);
        process(20, 1, 200, 77);
        process(21, 20, 30, 77);
        process(22, 21, 4, 5);
        let proc = Proc(root.to_owned());
        let found = |port| Listening { port, proc: proc.clone() }.footprint();
        let all = Bytes((200 + 30 + 4 + 3) * 1024);
        assert_eq!(found(8080), Some(Footprint { run: 20, bytes: all, empty: None }));
        assert_eq!(found(8081), None);
        assert_eq!((proc.whole(20), proc.below(20)), (Some(all), Some(Bytes((30 + 4 + 2) * 1024))));
        assert_eq!((proc.below(22), proc.whole(23)), (None, None), "what is not there has no memory");
    }

    #[test]
    fn who_listens_in_the_place_of_another_is_told_where_that_is_certain() {
        let folder = tempfile::tempdir().expect("a folder");
        let root = folder.path();
        fs::create_dir(root.join("net")).expect("net");
        let process = |id: u32, parent: u32, session: u32, start: u32, socket: Option<u32>| {
            let folder = root.join(id.to_string());
            fs::create_dir_all(folder.join("fd")).expect("fd");
            let stat = format!("{id} (a) S {parent} 1 {session} {} {start} 0", "0 ".repeat(15));
            fs::write(folder.join("stat"), stat).expect("stat");
            if let Some(inode) = socket {
                std::os::unix::fs::symlink(format!("socket:[{inode}]"), folder.join("fd/3")).expect("fd");
            }
        };
        let mut table = "head\n".to_owned();
        let mut port = |port: u16, inode: u32| {
            table += &format!("0: 0100007F:{port:04X} 00000000:0000 0A 0:0 0:0 0 0 0 {inode} 1\n");
        };
        // The program that was started, at 100, with a child and one that left for its session's sake.
        process(10, 1, 9, 100, None);
        process(11, 10, 9, 110, Some(1));
        process(12, 1, 10, 120, Some(2));
        // One that was there before, one that came later, one of another agent that came later.
        process(20, 1, 20, 50, Some(3));
        process(30, 1, 30, 150, Some(4));
        process(40, 1, 40, 150, None);
        fs::write(root.join("40/cmdline"), ["wharf", "shim", "--grace", "1", ""].join("\0")).expect("cmdline");
        process(41, 40, 40, 151, Some(5));
        for number in 1..=5 {
            port(8000 + number, u32::from(number));
        }
        fs::write(root.join("net/tcp"), table).expect("tcp");
        let usurper = |port| Listening { port, proc: Proc(root.to_owned()) }.usurper(10);
        assert_eq!([8001, 8002, 8003, 8004, 8005, 8006].map(usurper), [None, None, Some(20), None, Some(41), None]);
    }

    #[test]
    fn this_process_is_found_by_its_port() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = listener.local_addr().expect("an address").port();
        let found = Listening::on(port).footprint().expect("it listens");
        assert_eq!(found.run, u64::from(std::process::id()));
        assert!(found.bytes > Bytes(64 << 10), "{found:?}");
    }
}
