//! Which files of an artifact a version is made of: Seldon's rules for numbered folders, which differ by server.
//!
//! Seldon walks folders in the order of their names and takes the first of equal numbers; so does this.

use std::collections::{BTreeMap, BTreeSet};

use super::bad;
use crate::domain::copy::Failure;

/// Paths to put into the model's folder, each with the path in the artifact that it comes from.
pub(super) type Links = BTreeMap<String, String>;

/// Where an artifact has the model that is meant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Folder<'a> {
    /// Its path in the artifact; empty for the artifact itself.
    pub(super) path: String,
    /// The files in it: path in the folder, and in the artifact.
    pub(super) files: BTreeMap<&'a str, &'a str>,
}

/// The rule of servers that nothing more is known of. A wanted artifact version takes the folder of that number, and
/// none the folder with the highest; without numbered folders the whole artifact is meant, and so it is when a
/// `model-settings.json` is at the top. Files beside the numbered folders come along.
///
/// # Errors
/// When the wanted version is not there.
pub(super) fn plain<'a>(paths: impl IntoIterator<Item = &'a str>, wanted: Option<u32>) -> Result<Links, Failure> {
    let paths: Vec<&str> = paths.into_iter().collect();
    let whole = || paths.iter().map(|path| ((*path).to_owned(), (*path).to_owned())).collect();
    if paths.contains(&super::mlserver::SETTINGS) {
        return Ok(whole());
    }
    let number = |path: &str| path.split_once('/').and_then(|(folder, _)| folder.parse::<u32>().ok());
    let highest = paths.iter().filter_map(|path| number(path)).max();
    let chosen = match (wanted, highest) {
        (None, None) => return Ok(whole()),
        (None, Some(highest)) => highest,
        (Some(wanted), _) if paths.iter().any(|path| number(path) == Some(wanted)) => wanted,
        (Some(wanted), None) => {
            return Err(bad(format!(
                "artifactVersion {wanted} was asked for, and the artifact has no numbered folders; leave it out"
            )));
        }
        (Some(wanted), Some(highest)) => {
            return Err(bad(format!("the artifact has no folder {wanted}; its highest is {highest}")));
        }
    };
    let mut selected = Links::new();
    for path in paths.iter().filter(|path| !path.contains('/')) {
        selected.insert((*path).to_owned(), (*path).to_owned());
    }
    for path in paths.iter().filter(|path| number(path) == Some(chosen)) {
        let inside = path.split_once('/').map_or(*path, |(_, inside)| inside);
        selected.insert(inside.to_owned(), (*path).to_owned());
    }
    Ok(selected)
}

/// The folder with the `settings` that are meant: the artifact itself when they are at its top, whatever version is
/// wanted; else the one folder of the wanted number that has them, or, when none is wanted, the one with the highest
/// number. Nothing when no numbered folder has settings.
///
/// # Errors
/// When the wanted version is not there, or there several times.
pub(super) fn with_settings<'a>(
    paths: impl IntoIterator<Item = &'a str>,
    settings: &str,
    wanted: Option<u32>,
) -> Result<Option<Folder<'a>>, Failure> {
    let paths: Vec<&str> = paths.into_iter().collect();
    if paths.contains(&settings) {
        return Ok(Some(folder(&paths, &[])));
    }
    let holding: Vec<Vec<&str>> =
        folders(&paths).into_iter().filter(|folder| paths.contains(&join(folder, settings).as_str())).collect();
    let Some(wanted) = wanted else {
        let highest = highest(&holding);
        return Ok(highest.map(|highest| folder(&paths, highest)));
    };
    let name = wanted.to_string();
    let named: Vec<&Vec<&str>> = holding.iter().filter(|folder| folder.last() == Some(&name.as_str())).collect();
    match named.as_slice() {
        [one] => Ok(Some(folder(&paths, one))),
        [] if holding.is_empty() => Ok(None),
        [] => Err(bad(format!(
            "artifactVersion {wanted} was asked for, and no folder {wanted} of the artifact has a {settings}; there is \
             one in {}",
            shown(&holding)
        ))),
        _ => Err(bad(format!(
            "artifactVersion {wanted} was asked for, and several folders {wanted} have a {settings}: {}; let storageUri \
             name the one that is meant",
            named.iter().map(|folder| folder.join("/")).collect::<Vec<_>>().join(", ")
        ))),
    }
}

/// The version folder that is meant: of the wanted number at the top, or the highest above 0 wherever it is. Nothing
/// when no version is wanted and there is no such folder: then the artifact itself is one.
///
/// # Errors
/// When the wanted version is not there.
pub(super) fn version_folder<'a>(
    paths: impl IntoIterator<Item = &'a str>,
    wanted: Option<u32>,
) -> Result<Option<Folder<'a>>, Failure> {
    let paths: Vec<&str> = paths.into_iter().collect();
    let folders: Vec<Vec<&str>> = folders(&paths).into_iter().collect();
    let Some(wanted) = wanted else {
        let highest = highest(&folders);
        return Ok(highest.map(|highest| folder(&paths, highest)));
    };
    let name = wanted.to_string();
    let there = folders.iter().find(|folder| folder.as_slice() == [name.as_str()]);
    match there {
        Some(there) => Ok(Some(folder(&paths, there))),
        None => {
            let numbered: Vec<_> =
                folders.into_iter().filter(|folder| folder.len() == 1 && number(folder) > 0).collect();
            let others = if numbered.is_empty() {
                "no numbered folders; leave it out".to_owned()
            } else {
                format!("only {}", shown(&numbered))
            };
            Err(bad(format!("artifactVersion {wanted} was asked for, and the artifact has {others}")))
        }
    }
}

/// Every folder, in the order in which a walk meets them.
fn folders<'a>(paths: &[&'a str]) -> BTreeSet<Vec<&'a str>> {
    let mut folders = BTreeSet::new();
    for path in paths {
        let mut parts: Vec<&str> = path.split('/').collect();
        while parts.pop().is_some() && !parts.is_empty() {
            folders.insert(parts.clone());
        }
    }
    folders
}

fn number(folder: &[&str]) -> u64 {
    let digits = folder.last().filter(|name| name.bytes().all(|byte| byte.is_ascii_digit()));
    digits.and_then(|name| name.parse().ok()).unwrap_or(0)
}

fn highest<'f, 'a>(folders: &'f [Vec<&'a str>]) -> Option<&'f Vec<&'a str>> {
    // `max_by_key` takes the last of equals.
    folders.iter().rev().filter(|folder| number(folder) > 0).max_by_key(|folder| number(folder))
}

fn folder<'a>(paths: &[&'a str], folder: &[&str]) -> Folder<'a> {
    let path = folder.join("/");
    let prefix = if path.is_empty() { String::new() } else { format!("{path}/") };
    let files = paths.iter().filter_map(|path| Some((path.strip_prefix(&prefix)?, *path))).collect();
    Folder { path, files }
}

fn join(folder: &[&str], file: &str) -> String {
    format!("{}/{file}", folder.join("/"))
}

fn shown(folders: &[Vec<&str>]) -> String {
    const SHOWN: usize = 5;
    let mut names: Vec<String> = folders.iter().take(SHOWN).map(|folder| folder.join("/")).collect();
    if folders.len() > SHOWN {
        names.push(format!("{} more", folders.len() - SHOWN));
    }
    names.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(paths: &[&str], wanted: Option<u32>) -> Vec<(String, String)> {
        plain(paths.iter().copied(), wanted).expect("there").into_iter().collect()
    }

    fn pair(to: &str, from: &str) -> (String, String) {
        (to.to_owned(), from.to_owned())
    }

    #[test]
    fn without_numbers_the_whole_artifact_is_meant() {
        assert_eq!(chosen(&["m.onnx", "a/b"], None), [pair("a/b", "a/b"), pair("m.onnx", "m.onnx")]);
    }

    #[test]
    fn the_highest_or_the_wanted_number_is_taken_with_what_lies_beside() {
        let paths = ["config.pbtxt", "1/m.onnx", "2/m.onnx", "10/m.onnx"];
        assert_eq!(chosen(&paths, None), [pair("config.pbtxt", "config.pbtxt"), pair("m.onnx", "10/m.onnx")]);
        assert_eq!(chosen(&paths, Some(2))[1], pair("m.onnx", "2/m.onnx"));
        assert!(plain(paths, Some(3)).is_err());
        assert!(plain(["m.onnx"], Some(1)).is_err());
    }

    #[test]
    fn settings_at_the_top_win() {
        assert_eq!(chosen(&["model-settings.json", "1/m", "2/m"], Some(1)).len(), 3);
    }

    fn settings<'a>(paths: &[&'a str], wanted: Option<u32>) -> Result<Option<Folder<'a>>, Failure> {
        with_settings(paths.iter().copied(), "s.json", wanted)
    }

    fn path(found: Result<Option<Folder<'_>>, Failure>) -> Option<String> {
        found.expect("there").map(|folder| folder.path)
    }

    #[test]
    fn settings_are_found_at_the_top_in_the_wanted_folder_or_in_the_highest() {
        assert_eq!(path(settings(&["s.json", "1/s.json"], Some(1))), Some(String::new()));
        let paths = ["2/s.json", "2/m", "10/s.json", "11/m", "a/3/s.json"];
        assert_eq!(path(settings(&paths, None)), Some("10".to_owned()));
        assert_eq!(path(settings(&paths, Some(3))), Some("a/3".to_owned()));
        let files = settings(&paths, Some(2)).expect("there").expect("one").files;
        assert_eq!(files, BTreeMap::from([("m", "2/m"), ("s.json", "2/s.json")]));
        assert!(settings(&paths, Some(11)).expect_err("no settings").message.contains("no folder 11"));
        let twice = settings(&["a/1/s.json", "b/1/s.json"], Some(1)).expect_err("two");
        assert!(twice.message.contains("a/1, b/1"), "{}", twice.message);
        assert_eq!(path(settings(&["b/1/s.json", "a/1/s.json"], None)), Some("a/1".to_owned()));
        assert_eq!(path(settings(&["1/m", "x/s.json"], None)), None);
        assert_eq!(path(settings(&["1/m"], Some(1))), None);
    }

    #[test]
    fn a_version_folder_is_the_wanted_one_at_the_top_or_the_highest_anywhere() {
        let paths = ["config", "1/m", "2/m", "deep/down/7/m", "0/m", "x1/m"];
        let found = |wanted| version_folder(paths, wanted);
        assert_eq!(path(found(None)), Some("deep/down/7".to_owned()));
        assert_eq!(path(found(Some(2))), Some("2".to_owned()));
        assert!(found(Some(7)).expect_err("not at the top").message.contains("only 1, 2"));
        assert_eq!(path(version_folder(["m", "0/x"], None)), None);
        assert!(version_folder(["m"], Some(1)).is_err());
    }
}
