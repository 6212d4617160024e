//! The folder that rclone copies into.

use std::{collections::BTreeSet, fs, io, path::Path};

use super::super::transfer::below;
use crate::{agent::disk, domain::copy::Failure};

/// Removes from `folder` what is not one of `paths`: files that are not in the store any more, and what a copy that broke
/// had not finished. Bytes that stay.
///
/// # Errors
/// When a path can't be one in a folder, or what is there can't be removed.
pub(super) fn tidy(folder: &Path, paths: &BTreeSet<String>) -> Result<u64, Failure> {
    for path in paths {
        below(folder, path)?;
    }
    clear(folder, "", paths).map_err(|error| disk::failure("the download can't be written", folder, &error))
}

fn clear(folder: &Path, prefix: &str, paths: &BTreeSet<String>) -> io::Result<u64> {
    let mut bytes = 0_u64;
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let name = entry.file_name().to_str().map(|name| format!("{prefix}{name}"));
        let (kind, path) = (entry.file_type()?, entry.path());
        match name {
            Some(name) if kind.is_dir() => bytes = bytes.saturating_add(clear(&path, &format!("{name}/"), paths)?),
            Some(name) if kind.is_file() && paths.contains(&name) => {
                bytes = bytes.saturating_add(entry.metadata()?.len());
            }
            _ => disk::remove(&path)?,
        }
    }
    Ok(bytes)
}

/// Removes all that is in `folder`.
pub(super) fn empty(folder: &Path) -> io::Result<()> {
    fs::read_dir(folder)?.try_for_each(|entry| disk::remove(&entry?.path()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_in_the_store_does_not_stay() {
        let dir = tempfile::tempdir().expect("dir");
        let write = |path: &str, bytes: usize| {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().expect("a folder")).expect("dir");
            fs::write(path, vec![0; bytes]).expect("written");
        };
        write("1/m.onnx", 3);
        write("1/m.onnx.a1b2.partial", 5);
        write("old/x", 7);
        let paths = |all: &[&str]| all.iter().map(|path| (*path).to_owned()).collect::<BTreeSet<_>>();
        assert_eq!(tidy(dir.path(), &paths(&["1/m.onnx", "2/n"])), Ok(3));
        assert_eq!(disk::size(dir.path()), 3);
        for path in ["../x", "/x", "a//b", "a/../../x", ""] {
            assert!(tidy(dir.path(), &paths(&[path])).is_err(), "{path}");
        }
        empty(dir.path()).expect("emptied");
        assert_eq!(fs::read_dir(dir.path()).expect("there").count(), 0);
    }
}
