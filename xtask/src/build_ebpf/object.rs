//! The object file: stripping it, and what of it the world outside sees.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use object::build::elf::{Builder, SectionData};
use object::elf;

/// Removes DWARF (nine tenths of the file). BTF stays: the kernel wants it.
pub(super) fn strip(bytes: &[u8]) -> Result<Vec<u8>> {
    let mut builder = Builder::read(bytes).context("the linker's output is no ELF object")?;
    for section in &mut builder.sections {
        let name = section.name.to_string();
        let name = name.strip_prefix(".rel").unwrap_or(&name);
        section.delete = name.starts_with(".debug") || name == ".llvm_addrsig";
    }
    // LLVM keeps names of sections and symbols in one table, the writer in two.
    let names = builder.sections.add();
    names.name = ".shstrtab".into();
    names.sh_type = elf::SHT_STRTAB;
    names.sh_addralign = 1;
    names.data = SectionData::SectionString;
    builder.delete_orphans();
    builder.delete_unused_versions();
    let mut out = Vec::new();
    builder.write(&mut out).context("write the stripped object")?;
    Ok(out)
}

/// How the interface of two objects differs: sections (programs), symbols (maps, globals), sizes of map definitions.
/// None when it doesn't.
pub(super) fn difference(committed: &[u8], built: &[u8]) -> Result<Option<String>> {
    let (committed, built) = (interface(committed)?, interface(built)?);
    let differing: Vec<_> = committed
        .keys()
        .chain(built.keys().filter(|key| !committed.contains_key(*key)))
        .filter(|key| committed.get(*key) != built.get(*key))
        .map(|key| match (committed.get(key), built.get(key)) {
            (Some(_), None) => format!("the committed one has a {key} too many"),
            (None, _) => format!("the committed one lacks {key}"),
            (Some(a), Some(b)) => format!("{key} has size {a} in the committed one and {b} in the fresh one"),
        })
        .collect();
    Ok((!differing.is_empty()).then(|| differing.join(", ")))
}

/// Name → size, for what isn't up to the compiler's taste (0 where the size is).
fn interface(bytes: &[u8]) -> Result<BTreeMap<String, u64>> {
    let builder = Builder::read(bytes).context("not an ELF object")?;
    let mut out = BTreeMap::new();
    for section in &builder.sections {
        let name = section.name.to_string();
        let size = match &section.data {
            SectionData::Data(data) if name == ".maps" || name == "maps" || name == "license" => {
                data.len() as u64
            }
            _ => 0,
        };
        if name.starts_with("cgroup/") || name == "sockops" || size > 0 {
            out.insert(format!("section {name}"), size);
        }
    }
    for symbol in &builder.symbols {
        if symbol.st_bind() == elf::STB_GLOBAL && symbol.section.is_some() {
            let size = if symbol.st_type() == elf::STT_OBJECT { symbol.st_size } else { 0 };
            out.insert(format!("symbol {}", symbol.name), size);
        }
    }
    Ok(out)
}
