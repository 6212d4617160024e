//! A commit of the journal: rows are encoded and put into its tables.
//!
//! The store is the embedded one, on memory in place of a file. So what the disk takes is not in it.

use anyhow::Context as _;
use redb::backends::InMemoryBackend;
use wharf::{
    domain::{
        memory::{Bytes, Resources},
        names::{ModelName, ReplicaId, ServerName},
        record::{CopyRow, ModelRow, VersionRow, Write},
        spec::{Deployment, ModelSpec, Passthrough},
        time::Instant,
        version::{Generation, Uid, Version},
    },
    ports::{Identity, Store as _},
    store::{EmbeddedStore, OpenBackend},
};

use super::Work;
use crate::models;

/// Models of the journal.
const MODELS: usize = 1000;
const CACHE: usize = 64 << 20;

/// The rows of one model: itself, a version, and a copy.
fn rows(number: usize) -> anyhow::Result<[Write; 3]> {
    let model = ModelName::new(&models::name(number))?;
    let (uid, version) = (Uid(number as u64 + 1), Version(1));
    let created = Instant::from_micros(1_800_000_000_000_000);
    let generation = Generation { uid, version, number: 1 };
    Ok([
        Write::PutModel(Box::new(ModelRow {
            name: model.clone(),
            uid,
            created,
            deployment: Deployment::default(),
            kubernetes: None,
            serving: Some(version),
            number_bound: 2,
            version_floor: version,
            deleted: None,
        })),
        Write::PutVersion(Box::new(VersionRow {
            model: model.clone(),
            uid,
            version,
            created,
            spec: ModelSpec {
                uri: format!("s3://models/{model}"),
                requirements: vec!["onnx".to_owned()],
                memory: Some(Bytes(1 << 20)),
                ..ModelSpec::default()
            },
            passthrough: Passthrough::default(),
            failed: None,
        })),
        Write::PutCopy(Box::new(CopyRow {
            model,
            generation,
            replica: ReplicaId::new(ServerName::new("bench")?, (number % 10) as u32),
            need: Resources::primary(Bytes(1 << 20)),
            routed: true,
            draining: false,
        })),
    ])
}

/// Commits of the rows of `together` models each, over those that the journal has.
pub(super) fn commits(together: usize) -> anyhow::Result<Work> {
    let identity = || Identity { cluster: "bench".to_owned(), lineage: "bench".to_owned() };
    let memory: OpenBackend = Box::new(|| Ok(Box::new(InMemoryBackend::new())));
    let store = EmbeddedStore::open_on("memory".to_owned(), memory, CACHE, identity)?;
    let rows = (0..MODELS).map(rows).collect::<anyhow::Result<Vec<_>>>()?.into_iter().flatten().collect::<Vec<_>>();
    store.commit(&rows)?;
    let mut turn = 0;
    Ok(Box::new(move |times| {
        for _ in 0..times {
            let each = rows.len() / MODELS * together;
            let commit = rows.chunks(each).nth(turn % (MODELS / together)).context("there are no rows")?;
            turn += 1;
            store.commit(commit)?;
        }
        Ok(())
    }))
}
