// See decode.rs.
