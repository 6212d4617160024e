//! How one program is started: its command with the blanks filled, and its ports.

use std::{
    collections::{BTreeMap, VecDeque},
    io,
    net::{Ipv4Addr, TcpListener},
    path::PathBuf,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use serde::{Deserialize, Serialize};

use crate::{
    agent::runtimes::Kind,
    domain::{names::ReplicaId, upkeep::Patience},
    settings::registry::{Command, PORTS},
};

/// Ports that were given out lately by this process: who got one may not listen there yet, and must not be taken for
/// another.
static LATELY: Mutex<VecDeque<u16>> = Mutex::new(VecDeque::new());
/// How many of them are remembered.
const KEPT: usize = 300;

/// What an agent is to run.
#[derive(Clone, Debug)]
pub struct Launch {
    /// The replica that it serves.
    pub replica: ReplicaId,
    /// The model that it serves, when it serves one.
    pub model: Option<String>,
    /// What it is.
    pub runtime: Kind,
    /// How it is started.
    pub command: Command,
    /// The model repository.
    pub repository: PathBuf,
    /// Where it is kept who the server is, when it outlives the agent.
    pub data_dir: PathBuf,
    /// This program, which the server is run through.
    pub shim: PathBuf,
    /// How long it may take until it is ready.
    pub start: Duration,
    /// How long it may take to stop before it is killed.
    pub grace: Duration,
    /// When it is started again.
    pub patience: Patience,
}

impl Launch {
    /// What is to run for `replica`, with its repository and the rest in `data_dir`.
    #[must_use]
    pub fn new(replica: ReplicaId, runtime: Kind, command: Command, data_dir: PathBuf) -> Self {
        Self {
            replica,
            model: None,
            runtime,
            command,
            repository: data_dir.join("repository"),
            data_dir,
            shim: PathBuf::from("/proc/self/exe"),
            start: Duration::from_secs(300),
            grace: Duration::from_secs(10),
            patience: Patience::default(),
        }
    }

    /// The same for one model, whose folder in the repository is called `served`.
    pub(super) fn of_model(&self, served: &str) -> Self {
        Self { model: Some(served.to_owned()), ..self.clone() }
    }

    /// The command as it is run with these ports.
    pub(super) fn filled(&self, ports: &Ports) -> io::Result<Command> {
        // The program may start in another folder than the agent did.
        let repository = std::path::absolute(&self.repository)?;
        let text = |path: &std::path::Path| path.display().to_string();
        let mut with = BTreeMap::from([
            ("http_port", ports.http.to_string()),
            ("grpc_port", ports.grpc.to_string()),
            ("metrics_port", ports.metrics.to_string()),
            ("port", ports.http.to_string()),
            ("repository", text(&repository)),
            ("replica", self.replica.to_string()),
            ("index", self.replica.index.to_string()),
        ]);
        if let Some(model) = &self.model {
            with.insert("model_name", model.clone());
            with.insert("model_path", text(&repository.join(model)));
        }
        Ok(self.command.filled(&with))
    }
}

/// Where a program listens on loopback.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Ports {
    pub(super) http: u16,
    pub(super) grpc: u16,
    pub(super) metrics: u16,
}

impl Ports {
    /// The ports that the command says, or free ones. One that is free may be taken before the program is there; it
    /// ends then, and the next start finds others.
    ///
    /// # Errors
    /// When they are another program's, or there are none.
    pub(super) fn choose(launch: &Launch) -> io::Result<Self> {
        let first = match launch.command.ports {
            None => 0,
            Some(first) => u16::try_from(launch.replica.index)
                .ok()
                .and_then(|index| first.checked_add(index.checked_mul(PORTS)?))
                .filter(|first| first.checked_add(PORTS - 1).is_some())
                .ok_or_else(|| {
                    io::Error::other(format!(
                        "there are no ports left for replica {} above {first}; give a lower first port",
                        launch.replica
                    ))
                })?,
        };
        if first == 0 {
            return Self::free();
        }
        // All are held until all are found, so that no two are the same.
        let take = |offset: u16| -> io::Result<TcpListener> {
            let port = first + offset;
            TcpListener::bind((Ipv4Addr::LOCALHOST, port)).map_err(|error| {
                let hint = "set ports to others, or leave them out to have free ones found";
                io::Error::new(error.kind(), format!("port {port} of 127.0.0.1 can't be had ({error}); {hint}"))
            })
        };
        drop([take(0)?, take(1)?, take(2)?]);
        Ok(Self { http: first, grpc: first + 1, metrics: first + 2 })
    }

    fn free() -> io::Result<Self> {
        let mut lately = LATELY.lock().unwrap_or_else(PoisonError::into_inner);
        // Held until all are found, so that no two are the same.
        let mut held = Vec::new();
        let mut ports = Vec::new();
        while ports.len() < usize::from(PORTS) {
            if held.len() > KEPT * 2 {
                return Err(io::Error::other("there are no free ports on 127.0.0.1"));
            }
            let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
            let port = listener.local_addr()?.port();
            held.push(listener);
            if !lately.contains(&port) {
                ports.push(port);
            }
        }
        lately.extend(&ports);
        let surplus = lately.len().saturating_sub(KEPT);
        lately.drain(..surplus);
        Ok(Self { http: ports[0], grpc: ports[1], metrics: ports[2] })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn launch(index: u32, ports: Option<u16>) -> Launch {
        let replica = ReplicaId::new("mlserver".parse().expect("a name"), index);
        let mut command = Command::of(Kind::MlServer, 1).expect("known");
        command.ports = ports;
        Launch::new(replica, Kind::MlServer, command, PathBuf::from("data"))
    }

    #[test]
    fn each_replica_has_ports_of_its_own_and_one_that_is_taken_is_named() {
        let free = Ports::choose(&launch(0, None)).expect("free");
        assert!(free.http != free.grpc && free.grpc != free.metrics);
        let taken = TcpListener::bind("127.0.0.1:0").expect("free");
        let port = taken.local_addr().expect("bound").port();
        let error = Ports::choose(&launch(0, Some(port))).expect_err("taken").to_string();
        assert!(error.contains(&format!("port {port} ")) && error.contains("leave them out"), "{error}");
        let error = Ports::choose(&launch(9000, Some(60_000))).expect_err("above the last").to_string();
        assert!(error.contains("lower first port"), "{error}");
    }

    #[test]
    fn blanks_are_absolute_paths_and_numbers() {
        let launch = launch(2, None).of_model("iris_1");
        let ports = Ports { http: 1, grpc: 2, metrics: 3 };
        let command = launch.filled(&ports).expect("a folder");
        assert!(command.argv[2].starts_with('/') && command.argv[2].ends_with("data/repository"), "{command:?}");
        assert_eq!(command.env["MLSERVER_GRPC_PORT"], "2");
    }
}
