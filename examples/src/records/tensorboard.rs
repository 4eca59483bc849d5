//! Records as TensorBoard's events.
//!
//! A file of events is a row of frames: the payload's length as 8 bytes, their checksum, the payload, its checksum, all
//! little-endian; a checksum is CRC-32C, turned and shifted so that a checksum over checksums is no fixed point
//! (<https://github.com/tensorflow/tensorflow/blob/master/tensorflow/core/lib/io/record_writer.h>). A payload is the message `Event` in
//! protocol buffers (<https://github.com/tensorflow/tensorflow/blob/master/tensorflow/core/util/event.proto> and
//! `core/framework/summary.proto`). Four fields of three messages are needed, so they are written here: the crates that do this bring
//! a compiler of protocol buffers or TensorFlow along. `examples/tests/external` has TensorBoard read what this writes.

use super::{AccuracyRecord, HeldOutRecord, RunRecord, StepRecord};

/// What every file begins with.
const VERSION: &str = "brain.Event:2";
/// Wire types of protocol buffers: a varint, eight bytes, bytes behind their length, four bytes.
const VARINT: u64 = 0;
const FIXED64: u64 = 1;
const BYTES: u64 = 2;
const FIXED32: u64 = 5;

/// The message `Event`, encoded.
pub(super) struct Event(Message);

impl Event {
    /// What a file begins with.
    pub(super) fn version(time: f64) -> Self {
        let mut event = Message::default();
        event.double(1, time);
        event.bytes(3, VERSION.as_bytes());
        Self(event)
    }

    /// A record as scalars.
    pub(super) fn of(record: &RunRecord) -> Self {
        let mut summary = Message::default();
        for (tag, value) in scalars(record) {
            let mut scalar = Message::default();
            scalar.bytes(1, tag.as_bytes());
            scalar.float(2, value as f32);
            summary.bytes(1, &scalar.0);
        }
        let mut event = Message::default();
        event.double(1, record.time());
        event.varint(2, record.step());
        event.bytes(5, &summary.0);
        Self(event)
    }

    /// The event as it stands in a file.
    pub(super) fn framed(&self) -> Vec<u8> {
        let payload = &self.0.0;
        let length = (payload.len() as u64).to_le_bytes();
        [&length[..], &masked_crc(&length).to_le_bytes(), payload, &masked_crc(payload).to_le_bytes()]
            .concat()
    }
}

/// Names and values of what a record has.
fn scalars(record: &RunRecord) -> Vec<(String, f64)> {
    let named = |pairs: &[(&str, Option<f64>)]| -> Vec<(String, f64)> {
        pairs.iter().filter_map(|&(name, value)| Some((name.to_owned(), value?))).collect()
    };
    match record {
        RunRecord::Step(step) => of_step(step),
        RunRecord::HeldOut(HeldOutRecord { loss_all, loss_answers, .. }) => {
            named(&[("loss/held_out_all", *loss_all), ("loss/held_out_answers", *loss_answers)])
        }
        RunRecord::Accuracy(AccuracyRecord { exact_match, f1, .. }) => {
            named(&[("accuracy/exact_match", Some(*exact_match)), ("accuracy/f1", Some(*f1))])
        }
    }
}

fn of_step(step: &StepRecord) -> Vec<(String, f64)> {
    let gibibytes = step.memory_bytes as f64 / f64::from(1 << 30);
    let values = [
        ("train/learning_rate", Some(step.learning_rate)),
        ("train/gradient_norm", step.grad_norm),
        ("train/loss_scale", Some(step.loss_scale)),
        ("train/skipped", Some(f64::from(u8::from(step.skipped)))),
        ("speed/tokens_per_second", Some(step.tokens_per_second)),
        ("speed/loss_tokens_per_second", Some(step.loss_tokens_per_second)),
        ("speed/mfu", step.mfu),
        ("memory/gibibytes", Some(gibibytes)),
    ];
    let loss = (format!("loss/train_{}", step.loss_on), step.loss);
    let others = values.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?)));
    std::iter::once(loss).chain(others).collect()
}

/// A message that is being encoded.
#[derive(Default)]
struct Message(Vec<u8>);

impl Message {
    fn raw_varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }

    fn key(&mut self, field: u64, wire_type: u64) {
        self.raw_varint(field << 3 | wire_type);
    }

    fn varint(&mut self, field: u64, value: u64) {
        self.key(field, VARINT);
        self.raw_varint(value);
    }

    fn double(&mut self, field: u64, value: f64) {
        self.key(field, FIXED64);
        self.0.extend(value.to_le_bytes());
    }

    fn float(&mut self, field: u64, value: f32) {
        self.key(field, FIXED32);
        self.0.extend(value.to_le_bytes());
    }

    fn bytes(&mut self, field: u64, value: &[u8]) {
        self.key(field, BYTES);
        self.raw_varint(value.len() as u64);
        self.0.extend(value);
    }
}

fn masked_crc(bytes: &[u8]) -> u32 {
    crc32c(bytes).rotate_right(15).wrapping_add(0xA282_EAD8)
}

/// CRC-32C (Castagnoli), reflected; <https://www.rfc-editor.org/rfc/rfc3720#appendix-B.4>.
fn crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |crc, &byte| TABLE[usize::from(crc as u8 ^ byte)] ^ (crc >> 8))
}

const TABLE: [u32; 256] = {
    const POLYNOMIAL: u32 = 0x82F6_3B78;
    let mut table = [0; 256];
    let mut byte = 0;
    while byte < 256 {
        let mut crc = byte as u32;
        let mut bit = 0;
        while bit < 8 {
            crc = if crc & 1 == 1 { crc >> 1 ^ POLYNOMIAL } else { crc >> 1 };
            bit += 1;
        }
        table[byte] = crc;
        byte += 1;
    }
    table
};

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A reader of messages that is independent of the writer above: fields in order, each with its bytes.
    fn fields(mut bytes: &[u8]) -> Vec<(u64, Vec<u8>)> {
        let mut fields = Vec::new();
        while !bytes.is_empty() {
            let key = take_varint(&mut bytes);
            let value = match key & 7 {
                VARINT => take_varint(&mut bytes).to_le_bytes().to_vec(),
                FIXED64 => take(&mut bytes, 8),
                FIXED32 => take(&mut bytes, 4),
                BYTES => {
                    let length = take_varint(&mut bytes) as usize;
                    take(&mut bytes, length)
                }
                other => panic!("wire type {other}"),
            };
            fields.push((key >> 3, value));
        }
        fields
    }

    fn take(bytes: &mut &[u8], count: usize) -> Vec<u8> {
        let (taken, rest) = bytes.split_at(count);
        *bytes = rest;
        taken.to_vec()
    }

    fn take_varint(bytes: &mut &[u8]) -> u64 {
        let (mut value, mut shift) = (0, 0);
        loop {
            let byte = take(bytes, 1)[0];
            value |= u64::from(byte & 0x7F) << shift;
            shift += 7;
            if byte & 0x80 == 0 {
                return value;
            }
        }
    }

    /// Steps, names and values of a file's scalars.
    pub(in crate::records) fn scalars(mut file: &[u8]) -> Vec<(u64, String, f32)> {
        let mut found = Vec::new();
        while !file.is_empty() {
            let length = take(&mut file, 8);
            assert_eq!(take(&mut file, 4), masked_crc(&length).to_le_bytes());
            let payload = take(&mut file, u64::from_le_bytes(length.try_into().unwrap()) as usize);
            assert_eq!(take(&mut file, 4), masked_crc(&payload).to_le_bytes());
            let event = fields(&payload);
            assert_eq!(event[0].0, 1, "a time comes first");
            let Some((_, summary)) = event.iter().find(|(field, _)| *field == 5) else { continue };
            let step = u64::from_le_bytes(event[1].1.clone().try_into().unwrap());
            for (_, scalar) in fields(summary) {
                let scalar = fields(&scalar);
                let value = f32::from_le_bytes(scalar[1].1.clone().try_into().unwrap());
                found.push((step, String::from_utf8(scalar[0].1.clone()).unwrap(), value));
            }
        }
        found
    }

    #[test]
    fn checksums_are_those_of_the_rfc() {
        assert_eq!(crc32c(b"123456789"), 0xE306_9283);
        assert_eq!(crc32c(&[0; 32]), 0x8A91_36AA);
        assert_eq!(crc32c(&[0xFF; 32]), 0x62A8_AB43);
    }

    #[test]
    fn a_file_begins_like_one_of_tensorflow() {
        // tf.summary.create_file_writer's first 32 bytes, but for the time in 14..22 and the checksum behind it.
        let bytes = Event::version(0.0).framed();
        assert_eq!(bytes[..8], [24, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(bytes[8..12], [0xA3, 0x7F, 0x4B, 0x22]);
        assert_eq!(bytes[12], 0x09);
        assert_eq!(bytes[21..36], *b"\x1A\x0Dbrain.Event:2");
    }
}
