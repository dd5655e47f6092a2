// See sample.rs.
