//! Where manifests are read from: files, folders and standard input.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, Read},
    path::{Path, PathBuf},
};

use super::{Document, Kind, ManifestError, node::MAX_BYTES, parse};

/// What a folder's files must end in to be read.
const EXTENSIONS: [&str; 3] = ["yaml", "yml", "json"];
/// The most files taken from one folder.
const MAX_FILES: usize = 100_000;

/// Every manifest in `paths`, in their order: a file, the files of a folder (`*.yaml`, `*.yml`, `*.json`,
/// sorted by name, not of folders in it), or `-` for `stdin`. Blocks.
///
/// # Errors
/// The first file that can't be read or understood, or two manifests for one object. Then nothing is given.
pub fn read(paths: &[PathBuf], stdin: &mut dyn Read) -> Result<Vec<Document>, ManifestError> {
    let mut documents = Vec::new();
    for path in paths {
        let before = documents.len();
        if path == Path::new("-") {
            documents.extend(parse("standard input", &text("standard input", &mut *stdin)?)?);
        } else if path.is_dir() {
            for file in folder(path)? {
                documents.extend(read_file(&file)?);
            }
        } else {
            documents.extend(read_file(path)?);
        }
        if documents.len() == before {
            return Err(ManifestError::Empty { file: shown(path) });
        }
    }
    once_each(&documents)?;
    Ok(documents)
}

fn read_file(path: &Path) -> Result<Vec<Document>, ManifestError> {
    let name = path.display().to_string();
    let mut file = File::open(path).map_err(|error| unreadable(&name, &error))?;
    parse(&name, &text(&name, &mut file)?)
}

/// All of `input`, unless it is more than is read.
fn text(name: &str, input: &mut dyn Read) -> Result<String, ManifestError> {
    let mut bytes = Vec::new();
    input.take(MAX_BYTES + 1).read_to_end(&mut bytes).map_err(|error| unreadable(name, &error))?;
    let unreadable = |problem: String| ManifestError::Unreadable { file: name.to_owned(), problem };
    if bytes.len() as u64 > MAX_BYTES {
        return Err(unreadable(format!("it is larger than {} MiB; divide it", MAX_BYTES / (1024 * 1024))));
    }
    String::from_utf8(bytes)
        .map_err(|error| unreadable(format!("byte {} is not UTF-8", error.utf8_error().valid_up_to() + 1)))
}

fn folder(path: &Path) -> Result<Vec<PathBuf>, ManifestError> {
    let name = path.display().to_string();
    let mut files = Vec::new();
    for entry in fs::read_dir(path).map_err(|error| unreadable(&name, &error))? {
        let path = entry.map_err(|error| unreadable(&name, &error))?.path();
        let wanted = path.extension().is_some_and(|e| EXTENSIONS.iter().any(|known| e.eq_ignore_ascii_case(known)));
        if wanted && path.is_file() {
            files.push(path);
        }
        if files.len() > MAX_FILES {
            let problem = format!("it holds more than {MAX_FILES} manifests; divide it");
            return Err(ManifestError::Unreadable { file: name, problem });
        }
    }
    files.sort();
    Ok(files)
}

/// Refuses two manifests for one object: which of them were to hold is anyone's guess.
fn once_each(documents: &[Document]) -> Result<(), ManifestError> {
    let mut seen = BTreeMap::new();
    for document in documents {
        let key = match &document.kind {
            Kind::Model(definition) => ("model", definition.name.as_str()),
            Kind::Server(server) => ("server", server.name.as_str()),
        };
        if let Some(first) = seen.insert(key, &document.source) {
            let (kind, name) = key;
            let (first, second) = (first.to_string(), document.source.to_string());
            return Err(ManifestError::Twice { kind, name: name.to_owned(), first, second });
        }
    }
    Ok(())
}

fn shown(path: &Path) -> String {
    if path == Path::new("-") { "standard input".to_owned() } else { path.display().to_string() }
}

fn unreadable(file: &str, error: &io::Error) -> ManifestError {
    let problem = match error.kind() {
        io::ErrorKind::NotFound => "there is no such file".to_owned(),
        io::ErrorKind::PermissionDenied => "permission denied".to_owned(),
        _ => error.to_string(),
    };
    ManifestError::Unreadable { file: file.to_owned(), problem }
}
