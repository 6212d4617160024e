//! Which files of an artifact a version is made of: Seldon's rule for numbered folders.
//!
//! A `model-settings.json` at the top always means the whole artifact. Otherwise a wanted artifact version
//! takes the folder of that number, and none the folder with the highest; without numbered folders the
//! whole artifact is meant. Files beside the numbered folders come along, as servers keep their
//! configuration there.

use std::collections::BTreeMap;

use super::uri::bad;
use crate::domain::copy::Failure;

/// Paths to put into the model's folder, each with the path in the artifact that it comes from.
///
/// # Errors
/// When the wanted version is not there.
pub(super) fn select<'a>(
    paths: impl IntoIterator<Item = &'a str>,
    wanted: Option<u32>,
) -> Result<BTreeMap<String, String>, Failure> {
    let paths: Vec<&str> = paths.into_iter().collect();
    let whole = || paths.iter().map(|path| ((*path).to_owned(), (*path).to_owned())).collect();
    if paths.contains(&"model-settings.json") {
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
    let mut selected = BTreeMap::new();
    for path in paths.iter().filter(|path| !path.contains('/')) {
        selected.insert((*path).to_owned(), (*path).to_owned());
    }
    for path in paths.iter().filter(|path| number(path) == Some(chosen)) {
        let inside = path.split_once('/').map_or(*path, |(_, inside)| inside);
        selected.insert(inside.to_owned(), (*path).to_owned());
    }
    Ok(selected)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(paths: &[&str], wanted: Option<u32>) -> Vec<(String, String)> {
        select(paths.iter().copied(), wanted).expect("there").into_iter().collect()
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
        assert!(select(paths, Some(3)).is_err());
        assert!(select(["m.onnx"], Some(1)).is_err());
    }

    #[test]
    fn settings_at_the_top_win() {
        assert_eq!(chosen(&["model-settings.json", "1/m", "2/m"], Some(1)).len(), 3);
    }
}
