//! What the program that prints the figures shares with Criterion's: the functions that both of them measure.

pub mod bodies;
pub mod functions;
pub mod models;
pub mod raw;
