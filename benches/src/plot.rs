//! Plots, as SVG: they are text, and lie beside the figures that they show.

use std::path::Path;

use anyhow::anyhow;
use plotters::prelude::{
    BLACK, ChartBuilder, Circle, Color as _, IntoDrawingArea as _, IntoLogRange as _, LineSeries, Palette as _,
    Palette99, PathElement, SVGBackend, WHITE,
};

/// One line of a plot.
#[derive(Clone, Debug)]
pub(crate) struct Line {
    name: String,
    points: Vec<(f64, f64)>,
}

/// Adds a point to the line of this name.
pub(crate) fn add(lines: &mut Vec<Line>, name: &str, x: f64, y: f64) {
    match lines.iter_mut().find(|line| line.name == name) {
        Some(line) => line.points.push((x, y)),
        None => lines.push(Line { name: name.to_owned(), points: vec![(x, y)] }),
    }
}

/// Draws `lines`, both axes logarithmic.
pub(crate) fn draw(path: &Path, title: &str, x: &str, y: &str, lines: &[Line]) -> anyhow::Result<()> {
    let all = || lines.iter().flat_map(|line| line.points.iter());
    let bounds = |value: fn(&(f64, f64)) -> f64| {
        let (low, high) = all().map(value).fold((f64::MAX, f64::MIN), |(low, high), v| (low.min(v), high.max(v)));
        low / 1.5..high * 1.5
    };
    if all().next().is_none() {
        return Ok(());
    }
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir)?;
    }
    let wrong = |error: &dyn std::fmt::Display| anyhow!("{}: {error}", path.display());
    let area = SVGBackend::new(path, (900, 520)).into_drawing_area();
    area.fill(&WHITE).map_err(|e| wrong(&e))?;
    let mut chart = ChartBuilder::on(&area)
        .caption(title, ("sans-serif", 20))
        .margin(12)
        .x_label_area_size(40)
        .y_label_area_size(60)
        .build_cartesian_2d(bounds(|p| p.0).log_scale(), bounds(|p| p.1).log_scale())
        .map_err(|e| wrong(&e))?;
    chart.configure_mesh().x_desc(x).y_desc(y).light_line_style(WHITE).draw().map_err(|e| wrong(&e))?;
    for (index, line) in lines.iter().enumerate() {
        let colour = Palette99::pick(index).to_rgba();
        let series = LineSeries::new(line.points.iter().copied(), colour.stroke_width(2));
        chart
            .draw_series(series)
            .map_err(|e| wrong(&e))?
            .label(line.name.as_str())
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], colour.stroke_width(2)));
        let dots = line.points.iter().map(|point| Circle::new(*point, 3, colour.filled()));
        chart.draw_series(dots).map_err(|e| wrong(&e))?;
    }
    chart.configure_series_labels().border_style(BLACK).background_style(WHITE).draw().map_err(|e| wrong(&e))?;
    area.present().map_err(|e| wrong(&e))
}
