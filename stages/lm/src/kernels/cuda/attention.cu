// See attention.rs.
