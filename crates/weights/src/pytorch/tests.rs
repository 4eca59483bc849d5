//! Archives made by hand, whole and hostile. Real ones are read in `tests/weights/forms.rs`.

use std::path::Path;

use safetensors::Dtype;

use super::pickle::Fault;
use super::*;

/// A member's name, content, and what its table entry says instead of the truth.
struct Member<'a> {
    name: &'a str,
    content: &'a [u8],
    lie: Lie,
}

#[derive(Clone, Copy, PartialEq)]
enum Lie {
    None,
    Compressed,
    Encrypted,
    /// Its header is said to be here.
    At(u32),
    /// It is said to have this many bytes.
    Size(u32),
}

fn member<'a>(name: &'a str, content: &'a [u8]) -> Member<'a> {
    Member { name, content, lie: Lie::None }
}

/// A zip archive of members stored as they are.
fn archive(members: &[Member<'_>]) -> Vec<u8> {
    let (mut bytes, mut table) = (Vec::new(), Vec::new());
    for Member { name, content, lie } in members {
        let header = bytes.len() as u32;
        let (size, length) = (content.len() as u32, name.len() as u16);
        let numbers = |size: u32, flags: u16, method: u16| {
            let mut fields = [10_u16, flags, method, 0, 0].map(u16::to_le_bytes).concat();
            fields.extend([0, size, size].map(u32::to_le_bytes).concat());
            fields.extend([length, 0].map(u16::to_le_bytes).concat());
            fields
        };
        bytes.extend(b"PK\x03\x04");
        bytes.extend(numbers(size, 0, 0));
        bytes.extend(name.as_bytes());
        bytes.extend(*content);
        let said = if let Lie::Size(size) = lie { *size } else { size };
        table.extend(b"PK\x01\x02\x14\x00");
        table.extend(numbers(
            said,
            u16::from(*lie == Lie::Encrypted),
            u16::from(*lie == Lie::Compressed) * 8,
        ));
        table.extend([0; 10]);
        table.extend(if let Lie::At(place) = lie { *place } else { header }.to_le_bytes());
        table.extend(name.as_bytes());
    }
    let (start, length, count) = (bytes.len() as u32, table.len() as u32, members.len() as u16);
    bytes.extend(table);
    bytes.extend(b"PK\x05\x06\0\0\0\0");
    bytes.extend([count, count].map(u16::to_le_bytes).concat());
    bytes.extend([length, start].map(u32::to_le_bytes).concat());
    bytes.extend([0; 2]);
    bytes
}

/// A text as protocol 2 writes it.
fn text(text: &str) -> Vec<u8> {
    [b"X".to_vec(), (text.len() as u32).to_le_bytes().to_vec(), text.as_bytes().to_vec()].concat()
}

fn int(value: i64) -> Vec<u8> {
    [b"\x8a\x08".to_vec(), value.to_le_bytes().to_vec()].concat()
}

fn tuple(items: &[Vec<u8>]) -> Vec<u8> {
    [b"(".to_vec(), items.concat(), b"t".to_vec()].concat()
}

fn ints(values: &[i64]) -> Vec<u8> {
    tuple(&values.iter().map(|&value| int(value)).collect::<Vec<_>>())
}

/// The call that makes a tensor of storage `0`.
fn tensor(kind: &str, elements: i64, offset: i64, shape: &[i64], stride: &[i64]) -> Vec<u8> {
    let class = format!("ctorch\n{kind}Storage\n").into_bytes();
    let storage = tuple(&[text("storage"), class, text("0"), text("cpu"), int(elements)]);
    let hooks = b"ccollections\nOrderedDict\n)R".to_vec();
    let arguments =
        [[storage, b"Q".to_vec()].concat(), int(offset), ints(shape), ints(stride), b"\x89".to_vec(), hooks];
    [b"ctorch._utils\n_rebuild_tensor_v2\n".to_vec(), tuple(&arguments), b"R".to_vec()].concat()
}

/// A state dict of these entries.
fn dict(entries: &[(&str, Vec<u8>)]) -> Vec<u8> {
    let entries: Vec<u8> =
        entries.iter().flat_map(|(name, value)| [text(name), value.clone()].concat()).collect();
    [b"\x80\x02}(".to_vec(), entries, b"u.".to_vec()].concat()
}

fn file(pickle: &[u8], storage: &[u8]) -> Vec<u8> {
    archive(&[member("m/data.pkl", pickle), member("m/byteorder", b"little"), member("m/data/0", storage)])
}

fn open(bytes: &[u8]) -> Result<Tensors, WeightsError> {
    parse(bytes, Place { path: Path::new("x.bin"), flag: "--model" })
}

#[track_caller]
fn refuse(bytes: &[u8], pieces: &[&str]) {
    let error = open(bytes).unwrap_err().to_string();
    for piece in pieces.iter().chain(&["x.bin", "--model"]) {
        assert!(error.contains(piece), "`{piece}` is not in: {error}");
    }
}

fn good() -> Vec<u8> {
    let entries = [
        ("w", tensor("Float", 8, 2, &[2, 3], &[3, 1])),
        ("step", int(7)),
        ("row", tensor("Float", 8, 0, &[1, 2], &[77, 1])),
        ("empty", tensor("Float", 8, 8, &[0, 9], &[1, 1])),
    ];
    file(&dict(&entries), &[7; 32])
}

#[test]
fn a_tensor_is_a_range_of_the_file() {
    let bytes = good();
    let storage = bytes.windows(8).position(|part| part == [7; 8]).unwrap();
    let tensors = open(&bytes).unwrap();
    assert_eq!(tensors.keys().collect::<Vec<_>>(), ["empty", "row", "w"]);
    assert_eq!(tensors["w"].data_offsets, (storage + 8, storage + 32));
    assert_eq!((tensors["w"].dtype, tensors["w"].shape.as_slice()), (Dtype::F32, [2, 3].as_slice()));
    assert_eq!(tensors["row"].data_offsets, (storage, storage + 8));
    assert_eq!(tensors["empty"].data_offsets, (storage + 32, storage + 32));
}

#[test]
fn a_pickle_that_names_anything_else_is_refused_by_that_name() {
    let calls: [(&[u8], &str); 5] = [
        (b"\x80\x02cposix\nsystem\n(X\x02\0\0\0lstR.", "posix.system"),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x02ls\x85R.", "os.system"),
        (b"\x80\x02cbuiltins\neval\n(X\x01\0\0\0atR.", "builtins.eval"),
        (b"\x80\x02ctorch\nload\n)R.", "torch.load"),
        (
            b"\x80\x02ctorch._utils\n_rebuild_device_tensor_from_numpy\n)R.",
            "_rebuild_device_tensor_from_numpy",
        ),
    ];
    for (pickle, name) in calls {
        let fault = pickle::read(pickle).unwrap_err();
        assert!(matches!(&fault, Fault::Code(found) if found.contains(name)), "{fault:?}");
        refuse(&file(pickle, &[]), &[name, "do not trust"]);
    }
    // Known names, called otherwise than PyTorch does.
    for pickle in [
        &b"\x80\x02ctorch\nFloatStorage\n)R."[..],
        b"\x80\x02ccollections\nOrderedDict\n(NtR.",
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.",
        b"\x80\x02ctorch._utils\n_rebuild_parameter\n(NtR.",
    ] {
        refuse(&file(pickle, &[]), &["data.pkl", "as PyTorch does"]);
    }
    for instruction in [b'i', b'o', 0x81, 0x92, b'P', 0x82, b'I', b'0', b'2', 0x97] {
        refuse(
            &file(&[0x80, 2, b')', b')', instruction], &[]),
            &["instruction 0x", "none that PyTorch writes"],
        );
    }
}

#[test]
fn every_contradiction_is_named() {
    let one = |tensor: Vec<u8>| file(&dict(&[("w", tensor)]), &[7; 32]);
    let float = |elements, offset, shape: &[i64], stride: &[i64]| {
        one(tensor("Float", elements, offset, shape, stride))
    };
    refuse(&float(9, 0, &[8], &[1]), &["`w`", "9 elements in F32 has 32 bytes"]);
    refuse(&float(1 << 62, 0, &[8], &[1]), &["`w`", "has 32 bytes"]);
    refuse(&float(-8, 0, &[8], &[1]), &["a storage is not described"]);
    refuse(&float(8, -1, &[8], &[1]), &["a tensor is not described"]);
    refuse(&float(8, 1, &[8], &[1]), &["`w`", "[8] from element 1 on is not inside its storage of 8"]);
    refuse(&float(8, i64::MAX, &[8], &[1]), &["`w`", "not inside its storage"]);
    refuse(&float(8, 0, &[1 << 32, 1 << 32], &[1, 1]), &["`w`", "not inside its storage"]);
    refuse(&float(8, 0, &[-2, 4], &[4, 1]), &["a tensor is not described"]);
    refuse(&float(8, 0, &[2, 4], &[1, 2]), &["`w`", "strides [1, 2]", "contiguous"]);
    refuse(&float(8, 0, &[2, 2], &[0, 1]), &["`w`", "strides [0, 1]"]);
    refuse(&float(8, 0, &[8], &[]), &["`w`", "strides []"]);
    refuse(&float(8, 0, &[1; 9], &[1; 9]), &["a tensor is not described"]);
    refuse(&one(tensor("Float8_e4m3fn", 32, 0, &[32], &[1])), &["torch.Float8_e4m3fnStorage"]);
    let twice = dict(&[("w", tensor("Float", 8, 0, &[8], &[1])), ("w", tensor("Float", 8, 0, &[8], &[1]))]);
    refuse(&file(&twice, &[7; 32]), &["`w`", "twice"]);
    let whole = dict(&[("w", tensor("Float", 8, 0, &[8], &[1]))]);
    refuse(&archive(&[member("data.pkl", &whole)]), &["`w`", "`data/0` is not in the archive"]);
    refuse(&archive(&[member("m/data/0", &[7; 32])]), &["without data.pkl"]);
    refuse(
        &archive(&[member("a/data.pkl", &whole), member("b/data.pkl", &whole)]),
        &["more than one data.pkl"],
    );
    let big = [member("data.pkl", &whole), member("data/0", &[7; 32]), member("byteorder", b"big")];
    refuse(&archive(&big), &["byte order is `big`"]);
    refuse(&file(b"\x80\x02N.", &[]), &["no dict of tensors"]);
    refuse(&file(&dict(&[]), &[]), &["no entry", "nothing"]);
    let nested = dict(&[("state_dict", dict(&[])[2..].strip_suffix(b".").unwrap().to_vec())]);
    refuse(&file(&nested, &[]), &["no entry", "`state_dict`"]);
    refuse(LEGACY, &["before PyTorch 1.6"]);
    refuse(ZIP, &["cut short"]);
}

#[test]
fn a_table_of_contents_that_lies_is_refused() {
    let pickle = dict(&[("w", tensor("Float", 8, 0, &[8], &[1]))]);
    let storage = [7; 32];
    let lying = |lie| {
        let mut members =
            [member("data.pkl", &pickle), member("data/0", &storage), member("data/1", &storage)];
        members[1].lie = lie;
        archive(&members)
    };
    assert!(open(&lying(Lie::None)).is_ok());
    refuse(&lying(Lie::Compressed), &["`data/0`", "compressed"]);
    refuse(&lying(Lie::Encrypted), &["`data/0`", "encrypted"]);
    refuse(&lying(Lie::At(0)), &["`data/0`", "does not lie where"]);
    refuse(&lying(Lie::At(u32::MAX)), &["`data/0`", "damaged"]);
    refuse(&lying(Lie::At(u32::MAX - 1)), &["`data/0`", "does not lie where"]);
    refuse(&lying(Lie::Size(u32::MAX - 1)), &["`data/0`", "does not lie where"]);
    refuse(&lying(Lie::Size(64)), &["`data/0` and `data/1`", "share bytes"]);
    refuse(&archive(&[member("data.pkl", &pickle), member("data.pkl", &pickle)]), &["`data.pkl`", "twice"]);
    // A table said to be elsewhere, or to have more entries.
    let good = lying(Lie::None);
    for (at, value) in [(6, u32::MAX - 1), (6, 0), (12, 0xFFFF_FFFF), (14, 77)] {
        let mut bytes = good.clone();
        let place = bytes.len() - at;
        bytes[place..place + 4].copy_from_slice(&value.to_le_bytes());
        assert!(open(&bytes).is_err(), "{at} {value}");
    }
}

#[test]
fn a_value_used_a_million_times_costs_nothing() {
    // A tuple of two of a tuple of two of ..., sixty times over: 2^60 values if anything copied.
    let mut laughs = b"\x80\x02)".to_vec();
    (0..60).for_each(|_| laughs.extend(b"q\0h\0\x86"));
    laughs.push(b'.');
    refuse(&file(&laughs, &[]), &["no dict of tensors"]);
    // A list and a dict that hold themselves.
    refuse(&file(b"\x80\x02]q\0h\0a.", &[]), &["no dict of tensors"]);
    refuse(&file(b"\x80\x02}q\0X\x01\0\0\0ah\0s.", &[]), &["no entry"]);
    // One long tuple as the arguments of many calls, and as a shape.
    let mut calls = [b"\x80\x02(".to_vec(), b"N".repeat(1 << 17), b"tq\x010".to_vec()].concat();
    calls.pop();
    (0..1 << 16).for_each(|_| calls.extend(b"ccollections\nOrderedDict\nh\x01R"));
    refuse(&file(&calls, &[]), &["what is called is no function"]);
    refuse(&file(&[&b"\x80\x02"[..], &b"(".repeat(100)].concat(), &[]), &["nested too deeply"]);
    refuse(&file(&[&b"\x80\x02"[..], &b")".repeat(1 << 19)].concat(), &[]), &["values"]);
    refuse(&file(&[&b"\x80\x04)"[..], &b"\x94".repeat(1 << 19)].concat(), &[]), &["keeps more than"]);
    refuse(&file(b"\x80\x02X\xff\xff\xff\xff", &[]), &["ends in the middle"]);
    refuse(&file(b"\x80\x02\x8d\xff\xff\xff\xff\xff\xff\xff\xff", &[]), &["ends in the middle"]);
    refuse(&file(b"\x80\x02(N\x86u.", &[]), &["the stack is empty"]);
}

#[test]
fn no_cut_and_no_changed_byte_panics() {
    let whole = good();
    for end in 0..whole.len() {
        assert!(open(&whole[..end]).is_err(), "cut at {end}");
    }
    for place in 0..whole.len() {
        for byte in [0, 1, b'(', b'R', b'h', b'q', b't', b'u', 0x7F, 0x80, 0xFF] {
            let mut bytes = whole.clone();
            bytes[place] = byte;
            if let Ok(tensors) = open(&bytes) {
                assert!(tensors.values().all(|info| info.data_offsets.1 <= bytes.len()));
            }
        }
    }
}
