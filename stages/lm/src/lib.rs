//! (being written)

mod kernels;
pub mod loss;
pub mod sample;
