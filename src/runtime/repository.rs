//! The folder that models are read from: `NAME/model.onnx`, or `NAME/NUMBER/model.onnx` with the highest number,
//! or either with any other one `.onnx` file.
//!
//! The rule of this module: a name never leads out of the folder.

use std::{
    fs,
    io::ErrorKind,
    path::{Path, PathBuf},
};

use super::failure::{Failure, Kind, clip};

/// The longest served name, in bytes: a model's longest name and its version behind it.
const LONGEST: usize = 264;
const WELL_KNOWN: &str = "model.onnx";

/// A folder of models.
#[derive(Debug)]
pub(super) struct Repository {
    root: PathBuf,
}

impl Repository {
    /// The models under `root`.
    pub(super) const fn new(root: PathBuf) -> Self {
        Self { root }
    }

    /// The file that model `name` is to be loaded from. Blocks.
    ///
    /// # Errors
    /// When the name is not valid, there is no such model, or no file in it that is surely meant.
    pub(super) fn find(&self, name: &str) -> Result<PathBuf, Failure> {
        check(name)?;
        let folder = self.root.join(name);
        if !folder.is_dir() {
            return Err(Failure::new(
                Kind::NotFound,
                format!("model {name:?} is not in the repository: {} is not a folder", folder.display()),
            ));
        }
        if let Some(file) = artifact(&folder)? {
            return Ok(file);
        }
        if let Some(version) = highest(&folder)?
            && let Some(file) = artifact(&version)?
        {
            return Ok(file);
        }
        Err(Failure::new(
            Kind::Artifact,
            format!("{} holds no .onnx file, neither itself nor in its highest-numbered folder", folder.display()),
        ))
    }

    /// The names of all models, in order. Blocks.
    ///
    /// # Errors
    /// When the folder can't be read. One that isn't there yet holds no models.
    pub(super) fn names(&self) -> Result<Vec<String>, Failure> {
        let mut names = Vec::new();
        for (name, path) in list(&self.root, Kind::Internal)? {
            if check(&name).is_ok() && path.is_dir() {
                names.push(name);
            }
        }
        names.sort_unstable();
        Ok(names)
    }
}

/// Checks a served name against `^[a-z0-9][-_a-z0-9]*$` and its longest length.
pub(super) fn check(name: &str) -> Result<(), Failure> {
    let allowed = |byte: u8| matches!(byte, b'a'..=b'z' | b'0'..=b'9');
    let valid = name.len() <= LONGEST
        && name.bytes().next().is_some_and(allowed)
        && name.bytes().all(|byte| allowed(byte) || matches!(byte, b'-' | b'_'));
    if valid {
        return Ok(());
    }
    Err(Failure::invalid(format!(
        "model name {:?} is not valid; names match ^[a-z0-9][-_a-z0-9]*$ and have at most {LONGEST} bytes",
        clip(name, 64)
    )))
}

/// The artifact right in `folder`, if there is one.
fn artifact(folder: &Path) -> Result<Option<PathBuf>, Failure> {
    let well_known = folder.join(WELL_KNOWN);
    if well_known.is_file() {
        return Ok(Some(well_known));
    }
    let mut found: Vec<PathBuf> = list(folder, Kind::Artifact)?
        .into_iter()
        .map(|(_, path)| path)
        .filter(|path| path.extension().is_some_and(|extension| extension == "onnx") && path.is_file())
        .collect();
    match found.len() {
        0 | 1 => Ok(found.pop()),
        many => Err(Failure::new(
            Kind::Artifact,
            format!("{} holds {many} .onnx files; keep one, or call the one to serve {WELL_KNOWN}", folder.display()),
        )),
    }
}

/// The folder in `folder` whose name is the highest number.
fn highest(folder: &Path) -> Result<Option<PathBuf>, Failure> {
    let numbered = list(folder, Kind::Artifact)?
        .into_iter()
        .filter_map(|(name, path)| Some((name.parse::<u64>().ok()?, path)))
        .filter(|(_, path)| path.is_dir());
    Ok(numbered.max_by_key(|(number, _)| *number).map(|(_, path)| path))
}

fn list(folder: &Path, kind: Kind) -> Result<Vec<(String, PathBuf)>, Failure> {
    let refuse = |error| Failure::new(kind, format!("{} can't be read: {error}", folder.display()));
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(refuse(error)),
    };
    let mut list = Vec::new();
    for entry in entries {
        let entry = entry.map_err(refuse)?;
        if let Ok(name) = entry.file_name().into_string() {
            list.push((name, entry.path()));
        }
    }
    Ok(list)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_name_leads_out_of_the_folder() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("models")).unwrap();
        fs::write(root.path().join("model.onnx"), "secret").unwrap();
        let repository = Repository::new(root.path().join("models"));
        for bad in ["", ".", "..", "../models", "/etc", "a/b", "a\\b", "A", "_a", "-a", "a\0", "é", &"x".repeat(265)] {
            assert_eq!(repository.find(bad).unwrap_err().kind, Kind::Invalid, "{bad:?}");
        }
        for good in ["iris_2", "0", "a-b_c", &"x".repeat(264)] {
            assert_eq!(repository.find(good).unwrap_err().kind, Kind::NotFound, "{good:?}");
        }
    }

    #[test]
    fn the_highest_number_is_taken_and_doubt_is_an_error() {
        let root = tempfile::tempdir().unwrap();
        let repository = Repository::new(root.path().to_owned());
        let put = |path: &str| {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "").unwrap();
        };
        let found = |name| repository.find(name).map(|path| path.strip_prefix(root.path()).unwrap().to_owned());
        put("a/2/model.onnx");
        put("a/10/model.onnx");
        put("a/x/model.onnx");
        assert_eq!(found("a"), Ok("a/10/model.onnx".into()));
        put("a/net.onnx");
        assert_eq!(found("a"), Ok("a/net.onnx".into()));
        put("a/other.onnx");
        assert_eq!(found("a").unwrap_err().kind, Kind::Artifact);
        put("a/model.onnx");
        assert_eq!(found("a"), Ok("a/model.onnx".into()));
        put("empty/readme.txt");
        assert_eq!(found("empty").unwrap_err().kind, Kind::Artifact);
        put("Not-A-Name/model.onnx");
        put("file");
        assert_eq!(repository.names(), Ok(vec!["a".to_owned(), "empty".to_owned()]));
    }
}
