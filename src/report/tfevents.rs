//! TensorBoard's event files: records of a length and bytes, each with a masked CRC-32C, whose bytes are `Event` messages of
//! protocol buffers. What is read by TensorBoard is read by others, too.

/// One number: tag, step, value and when.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Scalar<'t> {
    pub tag: &'t str,
    pub step: i64,
    pub value: f64,
    /// Seconds since 1970.
    pub time: f64,
}

/// A whole file. Values become f32, as the format has them.
pub(crate) fn file<'t>(start: f64, scalars: impl IntoIterator<Item = Scalar<'t>>) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut event = double(1, start);
    event.extend(block(3, b"brain.Event:2"));
    record(&mut bytes, &event);
    for Scalar { tag, step, value, time } in scalars {
        let mut measured = block(1, tag.as_bytes());
        measured.extend(field(2, 5));
        measured.extend((value as f32).to_le_bytes());
        let mut event = double(1, time);
        event.extend(field(2, 0));
        event.extend(varint(step as u64));
        event.extend(block(5, &block(1, &measured)));
        record(&mut bytes, &event);
    }
    bytes
}

fn record(bytes: &mut Vec<u8>, event: &[u8]) {
    let length = (event.len() as u64).to_le_bytes();
    bytes.extend(length);
    bytes.extend(masked(&length).to_le_bytes());
    bytes.extend(event);
    bytes.extend(masked(event).to_le_bytes());
}

/// A sum of bytes that contain sums of their own is not the sum of a sum.
fn masked(bytes: &[u8]) -> u32 {
    crc32c::crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// Number and wire type of a field.
fn field(number: u8, wire: u8) -> Vec<u8> {
    vec![number << 3 | wire]
}

fn double(number: u8, value: f64) -> Vec<u8> {
    [field(number, 1), value.to_le_bytes().to_vec()].concat()
}

fn block(number: u8, bytes: &[u8]) -> Vec<u8> {
    [field(number, 2), varint(bytes.len() as u64), bytes.to_vec()].concat()
}

fn varint(mut value: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    while value >= 0x80 {
        bytes.push(value as u8 | 0x80);
        value >>= 7;
    }
    bytes.push(value as u8);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The bytes that TensorBoard's own writer makes of the same events (tensorboard 2.21).
    #[test]
    fn a_record_is_that_of_tensorboard() {
        let found = file(1.0, [Scalar { tag: "train/loss", step: 300, value: 0.5, time: 2.0 }]);
        let hex: String = found.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(hex, include_str!("../../tests/fixtures/tfevents.hex").trim());
    }
}
