// See head.rs.
