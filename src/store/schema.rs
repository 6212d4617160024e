//! What the embedded journal's tables hold: keys, values, and the way from one schema to the next.
//!
//! The rule of this module: the tables are the state. A row's key starts with its model's name, so that all
//! rows of a model lie side by side; its value is a MessagePack map with field names, so that a field that is
//! added with a serde default needs no new schema. Everything else does, and gets a migration.

use std::{panic::resume_unwind, thread};

use redb::{ReadableTable, TableDefinition, WriteTransaction};
use serde::{Serialize, de::DeserializeOwned};

use crate::{
    domain::{
        names::{ModelName, ServerName},
        record::{Contents, CopyRow, ModelRow, ServerRow, SizeRow, VersionRow, Write},
        size::SizeKey,
        version::{Generation, Version},
    },
    ports::ModelRows,
};

/// Rows under composed keys.
pub(super) type Rows = TableDefinition<'static, &'static [u8], &'static [u8]>;

/// `schema`, `cluster`, `lineage` and `commits`, as text.
pub(super) const META: TableDefinition<'static, &'static str, &'static str> = TableDefinition::new("meta");
/// Models, by name.
pub(super) const MODELS: Rows = TableDefinition::new("models");
/// Versions, by model and number.
pub(super) const VERSIONS: Rows = TableDefinition::new("versions");
/// Copies, by model and generation.
pub(super) const COPIES: Rows = TableDefinition::new("copies");
/// Measured sizes, by model and what was measured.
pub(super) const SIZES: Rows = TableDefinition::new("sizes");
/// Servers, by name.
pub(super) const SERVERS: Rows = TableDefinition::new("servers");
/// One row: the counters.
pub(super) const COUNTERS: Rows = TableDefinition::new("counters");
/// The event ring, by place.
pub(super) const EVENTS: TableDefinition<'static, u64, &'static [u8]> = TableDefinition::new("events");

const THE_COUNTERS: &[u8] = b"counters";

/// Brings a journal from one schema to the next, within the transaction that also notes the new number.
pub(super) type Migration = fn(&WriteTransaction) -> Result<(), redb::Error>;

/// The migration at index `n` leads from schema `n + 1` to `n + 2`. Schema 1 is the first there was.
pub(super) const MIGRATIONS: &[Migration] = &[add_sizes];

/// Schema 2 has measured sizes. A journal from before has none: they are measured again.
fn add_sizes(transaction: &WriteTransaction) -> Result<(), redb::Error> {
    transaction.open_table(SIZES)?;
    Ok(())
}

/// The schema that this Wharf writes.
pub const SCHEMA: u64 = 1 + MIGRATIONS.len() as u64;

/// What a row's bytes turned out not to be.
#[derive(Debug, thiserror::Error)]
pub(super) enum RowError {
    /// The store could not be read or written.
    #[error(transparent)]
    Store(#[from] redb::Error),
    /// The bytes are no row.
    #[error("a row of table {table} can't be read: {problem}")]
    Decode { table: &'static str, problem: String },
    /// The row is under another row's key.
    #[error("a row of table {table} lies under the key of another")]
    Misplaced { table: &'static str },
    /// The row can't be written down.
    #[error("a row of table {table} can't be encoded: {problem}")]
    Encode { table: &'static str, problem: String },
}

macro_rules! from_redb {
    ($($error:ty),+) => {$(
        impl From<$error> for RowError {
            fn from(error: $error) -> Self {
                Self::Store(error.into())
            }
        }
    )+};
}
from_redb!(redb::StorageError, redb::TableError, redb::TransactionError);

/// The key of a version: its model's name, a zero byte, and the number. No name holds a zero byte.
fn version_key(model: &ModelName, version: Version) -> Vec<u8> {
    let mut key = prefix(model);
    key.extend_from_slice(&version.0.to_be_bytes());
    key
}

/// The key of a copy: its model's name, a zero byte, and its generation's numbers.
fn copy_key(model: &ModelName, generation: Generation) -> Vec<u8> {
    let mut key = prefix(model);
    key.extend_from_slice(&generation.uid.0.to_be_bytes());
    key.extend_from_slice(&generation.version.0.to_be_bytes());
    key.extend_from_slice(&generation.number.to_be_bytes());
    key
}

/// The key of a size: its model's name, a zero byte, and what was measured, its parts with a zero byte between them.
fn size_key(model: &ModelName, size: &SizeKey) -> Vec<u8> {
    let mut key = prefix(model);
    for (at, part) in [&size.artifact, &size.runtime, &size.configuration].into_iter().enumerate() {
        if at > 0 {
            key.push(0);
        }
        key.extend_from_slice(part.as_bytes());
    }
    key
}

fn prefix(model: &ModelName) -> Vec<u8> {
    let mut key = Vec::with_capacity(model.as_str().len() + 1 + 16);
    key.extend_from_slice(model.as_str().as_bytes());
    key.push(0);
    key
}

/// The keys between which all versions, or copies, of a model lie.
fn span(model: &ModelName) -> (Vec<u8>, Vec<u8>) {
    let first = prefix(model);
    let mut end = first.clone();
    if let Some(last) = end.last_mut() {
        *last = 1;
    }
    (first, end)
}

/// Creates every table, so that readers find them.
pub(super) fn create_tables(transaction: &WriteTransaction) -> Result<(), redb::Error> {
    for table in [MODELS, VERSIONS, COPIES, SIZES, SERVERS, COUNTERS] {
        transaction.open_table(table)?;
    }
    transaction.open_table(EVENTS)?;
    Ok(())
}

/// Applies `writes` in order.
pub(super) fn apply(transaction: &WriteTransaction, writes: &[Write]) -> Result<(), RowError> {
    let mut models = transaction.open_table(MODELS)?;
    let mut versions = transaction.open_table(VERSIONS)?;
    let mut copies = transaction.open_table(COPIES)?;
    let mut sizes = transaction.open_table(SIZES)?;
    let mut servers = transaction.open_table(SERVERS)?;
    let mut buffer = Vec::with_capacity(1024);
    for write in writes {
        match write {
            Write::PutModel(row) => {
                let value = encode("models", row.as_ref(), &mut buffer)?;
                models.insert(row.name.as_str().as_bytes(), value)?;
            }
            Write::RemoveModel(name) => {
                models.remove(name.as_str().as_bytes())?;
                let (first, end) = span(name);
                let range = first.as_slice()..end.as_slice();
                versions.retain_in::<&[u8], _>(range.clone(), |_, _| false)?;
                copies.retain_in::<&[u8], _>(range.clone(), |_, _| false)?;
                sizes.retain_in::<&[u8], _>(range, |_, _| false)?;
            }
            Write::PutVersion(row) => {
                let value = encode("versions", row.as_ref(), &mut buffer)?;
                versions.insert(version_key(&row.model, row.version).as_slice(), value)?;
            }
            Write::RemoveVersion(model, version) => {
                versions.remove(version_key(model, *version).as_slice())?;
            }
            Write::PutCopy(row) => {
                let value = encode("copies", row.as_ref(), &mut buffer)?;
                copies.insert(copy_key(&row.model, row.generation).as_slice(), value)?;
            }
            Write::RemoveCopy(model, generation) => {
                copies.remove(copy_key(model, *generation).as_slice())?;
            }
            Write::PutSize(row) => {
                let value = encode("sizes", row.as_ref(), &mut buffer)?;
                sizes.insert(size_key(&row.model, &row.key).as_slice(), value)?;
            }
            Write::RemoveSize(model, size) => {
                sizes.remove(size_key(model, size).as_slice())?;
            }
            Write::PutServer(row) => {
                let value = encode("servers", row.as_ref(), &mut buffer)?;
                servers.insert(row.name.as_str().as_bytes(), value)?;
            }
            Write::RemoveServer(name) => {
                servers.remove(name.as_str().as_bytes())?;
            }
            Write::PutCounters(counters) => {
                let value = encode("counters", counters, &mut buffer)?;
                transaction.open_table(COUNTERS)?.insert(THE_COUNTERS, value)?;
            }
        }
    }
    Ok(())
}

/// Reads every table: the large ones at once, each on a thread of its own, as most of the time goes into decoding.
pub(super) fn read(transaction: &redb::ReadTransaction) -> Result<Contents, RowError> {
    let (models, versions, copies) = thread::scope(|threads| -> Result<_, RowError> {
        // A system that has no more threads is not to be taken for a damaged page, so it is asked politely.
        let models = thread::Builder::new().spawn_scoped(threads, || {
            rows(transaction, "models", MODELS, |row: &ModelRow, key| row.name.as_str().as_bytes() == key)
        });
        let models = models.map_err(redb::Error::Io)?;
        let versions = thread::Builder::new().spawn_scoped(threads, || {
            rows(transaction, "versions", VERSIONS, |row: &VersionRow, key| version_key(&row.model, row.version) == key)
        });
        let versions = versions.map_err(redb::Error::Io)?;
        let copies =
            rows(transaction, "copies", COPIES, |row: &CopyRow, key| copy_key(&row.model, row.generation) == key);
        // A panic goes on here, where it is taken for a damaged page.
        let models = models.join().unwrap_or_else(|panic| resume_unwind(panic));
        let versions = versions.join().unwrap_or_else(|panic| resume_unwind(panic));
        Ok((models?, versions?, copies?))
    })?;
    let mut contents = Contents {
        models,
        versions,
        copies,
        sizes: rows(transaction, "sizes", SIZES, |row: &SizeRow, key| size_key(&row.model, &row.key) == key)?,
        servers: rows(transaction, "servers", SERVERS, |row: &ServerRow, key| row.name.as_str().as_bytes() == key)?,
        counters: match transaction.open_table(COUNTERS)?.get(THE_COUNTERS)? {
            Some(row) => decode("counters", row.value())?,
            None => Default::default(),
        },
    };
    share_names(&mut contents);
    Ok(contents)
}

fn rows<T: DeserializeOwned>(
    transaction: &redb::ReadTransaction,
    name: &'static str,
    table: Rows,
    belongs: impl Fn(&T, &[u8]) -> bool,
) -> Result<Vec<T>, RowError> {
    use redb::ReadableTableMetadata as _;
    let table = transaction.open_table(table)?;
    // A damaged count must not become an allocation.
    let expected = usize::try_from(table.len()?).unwrap_or(0).min(4_000_000);
    let mut rows = Vec::with_capacity(expected);
    for entry in table.iter()? {
        let (key, value) = entry?;
        let row: T = decode(name, value.value())?;
        if !belongs(&row, key.value()) {
            return Err(RowError::Misplaced { table: name });
        }
        rows.push(row);
    }
    Ok(rows)
}

/// Reads the rows of one model.
pub(super) fn read_model(transaction: &redb::ReadTransaction, name: &ModelName) -> Result<Option<ModelRows>, RowError> {
    let Some(row) = transaction.open_table(MODELS)?.get(name.as_str().as_bytes())? else { return Ok(None) };
    let (first, end) = span(name);
    let range = first.as_slice()..end.as_slice();
    let mut versions = Vec::new();
    for entry in transaction.open_table(VERSIONS)?.range::<&[u8]>(range.clone())? {
        versions.push(decode("versions", entry?.1.value())?);
    }
    let mut copies = Vec::new();
    for entry in transaction.open_table(COPIES)?.range::<&[u8]>(range.clone())? {
        copies.push(decode("copies", entry?.1.value())?);
    }
    let mut sizes = Vec::new();
    for entry in transaction.open_table(SIZES)?.range::<&[u8]>(range)? {
        sizes.push(decode("sizes", entry?.1.value())?);
    }
    Ok(Some(ModelRows { model: decode("models", row.value())?, versions, copies, sizes }))
}

/// Reads the row of one server.
pub(super) fn read_server(
    transaction: &redb::ReadTransaction,
    name: &ServerName,
) -> Result<Option<ServerRow>, RowError> {
    let row = transaction.open_table(SERVERS)?.get(name.as_str().as_bytes())?;
    row.map(|row| decode("servers", row.value())).transpose()
}

/// Lets the rows of one model share its name, and the copies of one server the server's: with a million
/// models that is a hundred megabytes. Versions and copies lie in the order of models.
fn share_names(contents: &mut Contents) {
    let Contents { models, versions, copies, servers, .. } = contents;
    let mut names = models.iter().map(|model| &model.name).peekable();
    for version in versions {
        while names.next_if(|name| **name < version.model).is_some() {}
        if let Some(name) = names.peek().filter(|name| ***name == version.model) {
            version.model = (*name).clone();
        }
    }
    let mut names = models.iter().map(|model| &model.name).peekable();
    for copy in copies {
        while names.next_if(|name| **name < copy.model).is_some() {}
        if let Some(name) = names.peek().filter(|name| ***name == copy.model) {
            copy.model = (*name).clone();
        }
        if let Ok(at) = servers.binary_search_by(|server| server.name.cmp(&copy.replica.server)) {
            copy.replica.server = servers[at].name.clone();
        }
    }
}

fn encode<'a, T: Serialize>(table: &'static str, row: &T, buffer: &'a mut Vec<u8>) -> Result<&'a [u8], RowError> {
    buffer.clear();
    rmp_serde::encode::write_named(buffer, row)
        .map_err(|error| RowError::Encode { table, problem: error.to_string() })?;
    Ok(buffer)
}

fn decode<T: DeserializeOwned>(table: &'static str, bytes: &[u8]) -> Result<T, RowError> {
    rmp_serde::from_slice(bytes).map_err(|error| RowError::Decode { table, problem: error.to_string() })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::domain::version::Uid;

    #[test]
    fn every_schema_before_the_current_one_has_its_migration() {
        assert_eq!(u64::try_from(MIGRATIONS.len()), Ok(SCHEMA - 1));
    }

    proptest! {
        #[test]
        fn keys_order_as_their_rows_do(
            a in ("[a-z0-9]([-a-z0-9]{0,6}[a-z0-9])?", any::<(u64, u32, u32)>()),
            b in ("[a-z0-9]([-a-z0-9]{0,6}[a-z0-9])?", any::<(u64, u32, u32)>()),
        ) {
            let row = |(name, (uid, version, number)): (String, (u64, u32, u32))| {
                let generation = Generation { uid: Uid(uid), version: Version(version), number };
                (ModelName::new(&name).expect("valid"), generation)
            };
            let (a, b) = (row(a), row(b));
            prop_assert_eq!(a.cmp(&b), copy_key(&a.0, a.1).cmp(&copy_key(&b.0, b.1)));
            let (a, b) = ((a.0, a.1.version), (b.0, b.1.version));
            prop_assert_eq!(a.cmp(&b), version_key(&a.0, a.1).cmp(&version_key(&b.0, b.1)));
        }
    }
}
