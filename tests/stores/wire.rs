//! A wire between a client and a store, which counts what the store sends and breaks when it is told to.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
    },
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    task::JoinSet,
};

pub struct Wire {
    pub address: String,
    /// Bytes that came from the store.
    pub passed: Arc<AtomicU64>,
    /// For each break to come, after how many bytes of a connection.
    breaks: Arc<Mutex<Vec<u64>>>,
    /// Connections that carry something, and whether they carry it slowly.
    state: Arc<Line>,
    _tasks: JoinSet<()>,
}

#[derive(Default)]
struct Line {
    open: AtomicU64,
    slow: AtomicBool,
}

impl Wire {
    pub async fn to(store: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (passed, breaks) = (Arc::<AtomicU64>::default(), Arc::<Mutex<Vec<u64>>>::default());
        let (count, cuts, store) = (Arc::clone(&passed), Arc::clone(&breaks), store.to_owned());
        let state = Arc::<Line>::default();
        let line = Arc::clone(&state);
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((client, _)) = listener.accept().await {
                connections.spawn(carry(
                    client,
                    store.clone(),
                    Arc::clone(&count),
                    Arc::clone(&cuts),
                    Arc::clone(&line),
                ));
            }
        });
        Self { address, passed, breaks, state, _tasks: tasks }
    }

    /// Breaks connections that carry so many bytes, one for each number; after 0 nothing comes through.
    pub fn break_after(&self, bytes: &[u64]) {
        *self.breaks.lock().unwrap() = bytes.to_vec();
    }

    /// Breaks that did not happen yet.
    pub fn whole(&self) -> usize {
        self.breaks.lock().unwrap().len()
    }

    /// Carries a few bytes at a time from now on.
    pub fn slow(&self) {
        self.state.slow.store(true, SeqCst);
    }

    /// Connections that are open.
    pub fn open(&self) -> u64 {
        self.state.open.load(SeqCst)
    }

    /// Bytes that came from the store since it was asked last.
    pub fn take(&self) -> u64 {
        self.passed.swap(0, SeqCst)
    }
}

struct Open(Arc<Line>);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, SeqCst);
    }
}

async fn carry(client: TcpStream, store: String, count: Arc<AtomicU64>, breaks: Arc<Mutex<Vec<u64>>>, line: Arc<Line>) {
    line.open.fetch_add(1, SeqCst);
    let _open = Open(Arc::clone(&line));
    let Ok(store) = TcpStream::connect(store).await else { return };
    let ((mut from_client, mut to_client), (mut from_store, mut to_store)) = (client.into_split(), store.into_split());
    // A client that closes is gone.
    let up = async { tokio::io::copy(&mut from_client, &mut to_store).await.map(drop).unwrap_or_default() };
    let down = async {
        let (mut buffer, mut carried) = (vec![0; 16 << 10], 0_u64);
        while let Ok(read @ 1..) = from_store.read(&mut buffer).await {
            if line.slow.load(SeqCst) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            carried += read as u64;
            count.fetch_add(read as u64, SeqCst);
            let (cut, nothing) = {
                let mut breaks = breaks.lock().unwrap();
                let nothing = breaks.first() == Some(&0);
                let cut = breaks.first().is_some_and(|after| carried >= *after);
                if cut {
                    breaks.remove(0);
                }
                (cut, nothing)
            };
            if cut && carried == read as u64 && nothing {
                return;
            }
            if to_client.write_all(&buffer[..read]).await.is_err() || cut {
                return;
            }
        }
    };
    tokio::select! {
        () = down => {}
        () = up => {}
    }
}
