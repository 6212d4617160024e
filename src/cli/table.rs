//! Tables: aligned on a terminal and off it, cut to the width of the one and never of the other.

use super::output::{Output, Tone, clean, clip};

/// The least width that a cut column keeps: less says nothing.
const LEAST: usize = 30;
/// What stands for an empty value.
const NOTHING: &str = "-";
/// What stands between two columns.
const GAP: &str = "  ";

/// One value and how it is meant.
#[derive(Clone, Debug)]
pub(crate) struct Cell {
    text: String,
    tone: Tone,
}

impl Cell {
    /// `text` in the colour of `tone`. An empty text shows as `-`, so that columns can be counted.
    pub(crate) fn toned(text: &str, tone: Tone) -> Self {
        let text = clean(text);
        Self { text: if text.trim().is_empty() { NOTHING.to_owned() } else { text }, tone }
    }
}

impl<T: std::fmt::Display> From<T> for Cell {
    fn from(text: T) -> Self {
        Self::toned(&text.to_string(), Tone::Plain)
    }
}

/// Rows under headers. The last column takes what is left of the width, and is the one that is cut.
#[derive(Debug)]
pub(crate) struct Table {
    headers: Vec<&'static str>,
    rows: Vec<Vec<Cell>>,
}

impl Table {
    pub(crate) fn new(headers: &[&'static str]) -> Self {
        Self { headers: headers.to_vec(), rows: Vec::new() }
    }

    /// Adds a row, with one cell for each header.
    pub(crate) fn row(&mut self, cells: impl IntoIterator<Item = Cell>) {
        let row: Vec<_> = cells.into_iter().collect();
        debug_assert_eq!(row.len(), self.headers.len(), "one cell for each header");
        self.rows.push(row);
    }

    /// The lines to write on `output`'s standard output.
    pub(crate) fn lines(&self, output: &Output) -> Vec<String> {
        let widths: Vec<usize> = (0..self.headers.len())
            .map(|column| {
                let cells = self.rows.iter().map(|row| row[column].text.chars().count());
                cells.chain([self.headers[column].len()]).max().unwrap_or(0)
            })
            .collect();
        let last = self.headers.len().saturating_sub(1);
        let before: usize = widths[..last].iter().map(|width| width + GAP.len()).sum();
        let left = output.width().map(|width| width.saturating_sub(before));
        // Where the last column has no room beside the others it goes below them, and is left out if it says nothing.
        let below = left.is_some_and(|left| left < LEAST.min(widths[last]));
        let left = left.map(|left| left.max(LEAST));
        let line = |cells: &mut dyn Iterator<Item = (String, Tone)>| {
            let mut line = String::new();
            for (column, (text, tone)) in cells.enumerate() {
                if column == last && below {
                    break;
                }
                if column == last {
                    let text = left.map_or_else(|| text.clone(), |left| clip(&text, left));
                    line.push_str(&output.paint(tone, &text));
                } else {
                    // Colour codes have no width, so the spaces are counted by the bare text.
                    let pad = widths[column] - text.chars().count();
                    line.push_str(&output.paint(tone, &text));
                    line.push_str(&" ".repeat(pad));
                    line.push_str(GAP);
                }
            }
            line.trim_end().to_owned()
        };
        let mut lines = vec![line(&mut self.headers.iter().map(|header| ((*header).to_owned(), Tone::Bold)))];
        for row in &self.rows {
            lines.push(line(&mut row.iter().map(|cell| (cell.text.clone(), cell.tone))));
            if let (true, Some(cell)) = (below, row.get(last).filter(|cell| cell.text != NOTHING)) {
                let width = output.width().unwrap_or(usize::MAX).saturating_sub(GAP.len());
                lines.push(format!("{GAP}{}", output.paint(cell.tone, &clip(&cell.text, width))));
            }
        }
        lines
    }

    /// Writes it as data.
    pub(crate) fn print(&self, output: &Output) {
        for line in self.lines(output) {
            output.data(&line);
        }
    }
}
