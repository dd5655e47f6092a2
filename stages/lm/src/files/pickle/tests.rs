//! Files of PyTorch's: those that it writes, those that nobody should write, and any bytes.

use std::fs;

use proptest::prelude::*;

use super::*;

/// Puts an archive together of a program and of storages by name.
fn archive(program: &[u8], storages: &[(&str, &[u8])]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut archive = zip::Writer::new(&mut bytes);
    archive.entry("model/data.pkl", program).unwrap();
    archive.entry("model/byteorder", b"little").unwrap();
    for (key, storage) in storages {
        archive.entry(&format!("model/data/{key}"), storage).unwrap();
    }
    archive.finish().unwrap();
    bytes
}

fn open(bytes: &[u8]) -> Result<PickleFile> {
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), bytes).unwrap();
    PickleFile::open(file.path())
}

fn error(bytes: &[u8]) -> String {
    format!("{:#}", open(bytes).err().expect("an error"))
}

fn text(text: &str) -> Vec<u8> {
    [b"X".as_slice(), &(text.len() as u32).to_le_bytes(), text.as_bytes()].concat()
}

fn number(number: i64) -> Vec<u8> {
    [&[0x8a, 8][..], &number.to_le_bytes()].concat()
}

fn tuple(items: &[i64]) -> Vec<u8> {
    [b"(".to_vec(), items.iter().flat_map(|item| number(*item)).collect(), b"t".to_vec()].concat()
}

/// A tensor `w` in a storage `0` that is said to have `count` numbers.
fn program(class: &str, count: i64, offset: i64, shape: &[i64], strides: &[i64]) -> Vec<u8> {
    [
        b"\x80\x02}(".to_vec(),
        text("w"),
        b"ctorch._utils\n_rebuild_tensor_v2\n((".to_vec(),
        text("storage"),
        format!("ctorch\n{class}\n").into_bytes(),
        text("0"),
        text("cpu"),
        number(count),
        b"tQ".to_vec(),
        number(offset),
        tuple(shape),
        tuple(strides),
        b"\x89ccollections\nOrderedDict\n)RtRu.".to_vec(),
    ]
    .concat()
}

fn floats(count: usize) -> Vec<u8> {
    (0..count).flat_map(|x| (x as f32).to_le_bytes()).collect()
}

/// A file as PyTorch itself writes it: `make_checkpoint.py`.
fn fixture() -> Vec<u8> {
    fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fixtures/checkpoint/pytorch_model.bin")).unwrap()
}

#[test]
fn what_was_written_is_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("some.bin");
    let tensors = [("a", vec![2, 3], 0), ("b", vec![4], 1), ("c", vec![2, 3], 0), ("d", vec![], 2)];
    let tensors = tensors.map(|(name, shape, storage)| Saved { name, shape, storage });
    let storages = [floats(6), floats(4), floats(1)];
    write(&path, Dtype::F32, &tensors, |storage| Ok(storages[storage].clone())).unwrap();
    let file = PickleFile::open(&path).unwrap();
    let found: Vec<_> = file.tensors().iter().map(|(name, tensor)| (name.as_str(), tensor.shape.clone())).collect();
    assert_eq!(found, [("a", vec![2, 3]), ("b", vec![4]), ("c", vec![2, 3]), ("d", vec![])]);
    for (name, storage) in [("a", 0), ("b", 1), ("c", 0), ("d", 2)] {
        assert_eq!(file.bytes(name).unwrap(), storages[storage], "{name}");
    }
}

/// A file of holes takes no room on disk.
#[test]
fn what_lies_behind_32_bits_has_a_place() {
    let before = 5_u64 << 30;
    let mut bytes = Vec::new();
    let mut archive = zip::Writer::behind(before, &mut bytes);
    archive.entry("model/data.pkl", &program("FloatStorage", 8, 0, &[8], &[1])).unwrap();
    archive.entry("model/data/0", &floats(8)).unwrap();
    archive.finish().unwrap();
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().write_all_at(zip::MAGIC, 0).unwrap();
    file.as_file().write_all_at(&bytes, before).unwrap();
    assert_eq!(PickleFile::open(file.path()).unwrap().bytes("w").unwrap(), floats(8));
}

#[test]
fn numbers_that_lie_in_another_order_are_put_in_theirs() {
    let open = |offset, shape: &[i64], strides: &[i64]| {
        open(&archive(&program("FloatStorage", 8, offset, shape, strides), &[("0", &floats(8))]))
    };
    let read = |offset, shape: &[i64], strides: &[i64]| {
        let bytes = open(offset, shape, strides).unwrap().bytes("w").unwrap();
        bytes.chunks_exact(4).map(|word| f32::from_le_bytes(word.try_into().unwrap())).collect::<Vec<_>>()
    };
    assert_eq!(read(0, &[2, 4], &[4, 1]), [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]);
    assert_eq!(read(0, &[4, 2], &[1, 4]), [0.0, 4.0, 1.0, 5.0, 2.0, 6.0, 3.0, 7.0]);
    assert_eq!(read(1, &[2, 2], &[4, 2]), [1.0, 3.0, 5.0, 7.0]);
    assert_eq!(read(3, &[2, 2], &[0, 1]), [3.0, 4.0, 3.0, 4.0]);
    assert_eq!(read(7, &[], &[]), [7.0]);
    assert_eq!(read(8, &[0, 3], &[3, 1]), [0.0; 0]);
}

#[test]
fn a_program_that_would_run_code_is_refused_by_name() {
    // What `pickle.dumps` makes of an object whose `__reduce__` is `(os.system, ("true",))`, in two protocols.
    for program in [
        [b"\x80\x02cposix\nsystem\n".to_vec(), text("true"), b"\x85R.".to_vec()].concat(),
        [b"\x80\x04\x8c\x05posix\x8c\x06system\x93".to_vec(), text("true"), b"\x85R.".to_vec()].concat(),
    ] {
        let error = error(&archive(&program, &[]));
        assert!(error.contains("asks Python for `posix.system`") && error.contains("nothing of it was run"), "{error}");
    }
    for (module, name) in [("builtins", "eval"), ("torch", "load"), ("collections", "OrderedDict\u{1b}[31m")] {
        let error = error(&archive(format!("\u{2}c{module}\n{name}\n.").replace('\u{2}', "").as_bytes(), &[]));
        assert!(error.contains(&format!("`{module}.")) && !error.contains('\u{1b}'), "{error}");
    }
    // A known name that is called with what it is not made for.
    let error = error(&archive(b"ctorch\nFloatStorage\n)R.", &[]));
    assert!(error.contains("it calls Storage(F32) with 0 values"), "{error}");
}

#[test]
fn what_a_program_says_of_its_storage_is_held_against_it() {
    let said = |class, count, offset, shape: &[i64], strides: &[i64]| {
        error(&archive(&program(class, count, offset, shape, strides), &[("0", &floats(8))]))
    };
    let cases = [
        (said("FloatStorage", 9, 0, &[8], &[1]), "said to hold 9 numbers of F32, and has 32 bytes"),
        (said("DoubleStorage", 8, 0, &[8], &[1]), "said to hold 8 numbers of F64"),
        (said("FloatStorage", 1 << 62, 0, &[8], &[1]), "said to hold 4611686018427387904 numbers"),
        (said("FloatStorage", 8, 1, &[8], &[1]), "which lead out of its storage of 8 numbers"),
        (said("FloatStorage", 8, 0, &[2, 2], &[7, 1]), "which lead out of its storage"),
        (said("FloatStorage", 8, 0, &[2], &[1 << 62]), "which lead out of its storage"),
        (said("FloatStorage", 8, i64::MAX, &[2], &[1]), "which lead out of its storage"),
        (said("FloatStorage", 8, 0, &[1 << 40, 1 << 40], &[0, 0]), "more than its storage of 8"),
        (said("FloatStorage", 8, 0, &[9], &[0]), "more than its storage of 8"),
        (said("FloatStorage", 8, 0, &[-1], &[1]), "a size of a tensor is -1"),
        (said("FloatStorage", 8, -8, &[1], &[1]), "a size of a tensor is -8"),
        (said("FloatStorage", 8, 0, &[2, 4], &[1]), "2 sizes and 1 strides"),
        (said("FloatStorage", 8, 0, &[1; 9], &[1; 9]), "9 sizes: expected at most 8"),
        (said("ComplexFloatStorage", 8, 0, &[1], &[1]), "asks Python for `torch.ComplexFloatStorage`"),
        (
            error(&archive(&program("FloatStorage", 8, 0, &[8], &[1]), &[("1", &floats(8))])),
            "lies in storage `0`, which is not there",
        ),
        (error(&archive(b"]Nq\0.", &[])), "holds no dictionary of tensors"),
        (
            error(&archive(&[b"}(".to_vec(), text("model"), b"}u.".to_vec()].concat(), &[])),
            "and has `model`: save the model's `state_dict()`",
        ),
        (error(&archive(b"}", &[])), "its pickle is cut off"),
        (error(&archive(b"h\x05.", &[])), "recalls what it did not remember"),
        (error(&archive(b"R.", &[])), "takes what is not there"),
        (error(&archive(b"\x82.", &[])), "the opcode 0x82"),
    ];
    for (error, expected) in cases {
        assert!(error.contains(expected), "{expected}: {error}");
    }
}

#[test]
fn archives_that_lie_are_refused() {
    let good = archive(&program("FloatStorage", 8, 0, &[8], &[1]), &[("0", &floats(8))]);
    open(&good).unwrap();
    let with = |place: usize, new: &[u8]| {
        let mut bytes = good.clone();
        bytes[place..place + new.len()].copy_from_slice(new);
        error(&bytes)
    };
    let directory = good.windows(4).rposition(|window| window == b"PK\x01\x02").unwrap();
    // The last entry is that of the storage.
    let cases = [
        (with(directory + 10, &8_u16.to_le_bytes()), "entry `model/data/0` is compressed, to 32 B of 32 B"),
        (
            with(directory + 24, &1_000_000_u32.to_le_bytes()),
            "entry `model/data/0` is compressed, to 32 B of 976.6 KiB",
        ),
        (with(directory + 8, &1_u16.to_le_bytes()), "entry `model/data/0` is encrypted"),
        (with(directory + 42, &0_u32.to_le_bytes()), "overlap"),
        (with(directory + 42, &7_u32.to_le_bytes()), "entry `model/data/0` is not where the directory says"),
        (with(directory + 42, &0x00ff_ffff_u32.to_le_bytes()), "entry `model/data/0` lies outside of the file"),
        (with(good.len() - 12, &2_u16.to_le_bytes()), "tensor `w` lies in storage `0`, which is not there"),
        (with(good.len() - 12, &60_000_u16.to_le_bytes()), "has no room for 60000 entries"),
        (with(good.len() - 6, &0xfff0_0000_u32.to_le_bytes()), "its directory lies outside of it"),
        (error(b"PK\x03\x04 and nothing else that an archive has"), "its directory is missing"),
        (error(b"not a zip"), "`torch.save` of PyTorch 1.6 or later writes: get it again"),
        (
            error(&[OLD_MAGIC, &[0; 90]].concat()),
            "of a version before 1.6: write it anew in Python, `torch.save(torch.load(",
        ),
        (error(b""), "does not begin as what"),
    ];
    for (error, expected) in cases {
        assert!(error.contains(expected), "{expected}: {error}");
    }
    // Both sizes, so that it is not compressed: it ends behind the file, and nothing is allocated for it.
    let mut bytes = good.clone();
    bytes[directory + 20..directory + 28].copy_from_slice(&[0x7fff_ffff_u32.to_le_bytes(); 2].concat());
    assert!(error(&bytes).contains("entry `model/data/0` of 2.0 GiB ends behind the file"));
    for length in (0..good.len()).step_by(5) {
        error(&good[..length]);
    }
    // Where 32 bits are said not to be enough, another record counts, and is held against the file as well.
    let large = good.windows(4).rposition(|window| window == b"PK\x06\x06").unwrap();
    let mut bytes = good.clone();
    let end = bytes.len();
    bytes[end - 10..end - 6].copy_from_slice(&u32::MAX.to_le_bytes());
    open(&bytes).unwrap();
    for (place, expected) in
        [(32, "has no room for 18446744073709551615 entries"), (40, "lies outside"), (48, "lies outside")]
    {
        let mut bytes = bytes.clone();
        bytes[large + place..large + place + 8].fill(0xff);
        assert!(error(&bytes).contains(expected), "{expected}: {}", error(&bytes));
    }
}

#[test]
fn names_that_repeat_cost_no_more_than_they_are_long() {
    // One long name for very many tensors would be copied for each.
    let tensor = &program("FloatStorage", 8, 0, &[8], &[1])[4 + text("w").len()..];
    let tensor = &tensor[..tensor.len() - 2];
    let twice = [
        b"}(".to_vec(),
        text(&"w".repeat(1 << 16)),
        b"q\x01".to_vec(),
        tensor.to_vec(),
        b"h\x01".to_vec(),
        tensor.to_vec(),
        b"u.".to_vec(),
    ];
    assert!(error(&archive(&twice.concat(), &[("0", &floats(8))])).contains("is there twice"));
    let long_key = String::from_utf8_lossy(&program("FloatStorage", 8, 0, &[8], &[1])).into_owned();
    assert!(long_key.contains("storage"));
    let many = [b"]".repeat(1 << 21), b".".to_vec()].concat();
    assert!(error(&archive(&many, &[])).contains("makes more than 1048576 values"));
}

/// Opens bytes and, where they are a file, reads all of it: of what is there no more than the file is long can come.
fn exhaust(bytes: &[u8]) {
    if let Ok(file) = open(bytes) {
        for (name, tensor) in file.tensors() {
            let read = file.bytes(name).unwrap();
            assert_eq!(read.len(), tensor.shape.iter().product::<usize>() * tensor.dtype.bitsize() / 8);
            assert!(read.len() <= bytes.len());
        }
    }
}

#[test]
fn interesting_inputs_do_no_harm() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fixtures/checkpoint/hostile");
    let mut count = 0;
    for path in fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
        if path.extension().is_some_and(|ending| ending == "bin") {
            let error = error(&fs::read(&path).unwrap());
            assert!(error.contains("is no model of PyTorch's"), "{}: {error}", path.display());
            count += 1;
        }
    }
    assert!(count >= 5, "{count}");
}

proptest! {
    #[test]
    fn no_program_makes_it_panic(
        opcodes in prop::collection::vec(
            prop_oneof![
                any::<u8>().prop_map(|byte| vec![byte]),
                prop::sample::select(b"()]}tNsuaeRQbq.\x85\x86\x87\x88\x94".to_vec()).prop_map(|byte| vec![byte]),
                any::<i64>().prop_map(number),
                (0_i64..9).prop_map(number),
                (0_u8..4).prop_map(|slot| vec![b'h', slot]),
                (0_u8..4).prop_map(|slot| vec![b'q', slot]),
                prop::sample::select(vec!["storage", "0", "w", "cpu"]).prop_map(text),
                prop::sample::select(vec![
                    "ctorch._utils\n_rebuild_tensor_v2\n", "ctorch._utils\n_rebuild_parameter\n",
                    "ctorch\nFloatStorage\n", "ccollections\nOrderedDict\n",
                ]).prop_map(|text| text.as_bytes().to_vec()),
            ],
            0..60,
        ),
    ) {
        _ = machine::run(&opcodes.concat());
    }

    #[test]
    fn no_sizes_lead_out_of_a_file(
        count in prop_oneof![Just(8), any::<i64>()],
        offset in prop_oneof![0_i64..9, any::<i64>()],
        axes in prop::collection::vec((prop_oneof![0_i64..9, any::<i64>()], prop_oneof![0_i64..9, any::<i64>()]), 0..4),
        class in prop::sample::select(vec!["FloatStorage", "HalfStorage", "ByteStorage", "LongStorage"]),
    ) {
        let (shape, strides): (Vec<i64>, Vec<i64>) = axes.into_iter().unzip();
        exhaust(&archive(&program(class, count, offset, &shape, &strides), &[("0", &floats(8))]));
    }

    #[test]
    fn no_change_of_a_file_makes_it_panic(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        is_ours in any::<bool>(),
        end in prop::option::of(any::<prop::sample::Index>()),
    ) {
        let mut bytes =
            if is_ours { archive(&program("FloatStorage", 8, 0, &[2, 4], &[4, 1]), &[("0", &floats(8))]) } else { fixture() };
        for (place, byte) in changes {
            let length = bytes.len();
            bytes[place.index(length)] = byte;
        }
        if let Some(end) = end {
            bytes.truncate(end.index(bytes.len()));
        }
        exhaust(&bytes);
    }
}
