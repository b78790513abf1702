//! The files of a model: their names and the index that the Hugging Face libraries look for.

use serde_json::{Map, Value, json};

use super::{ExportFormat, ExportPlan, ExportTensor, file::WeightsFile, read_tensor};
use crate::{CheckpointError, Progress, Result, Source, TensorFacts, output::Output};

/// Writes one file for each of `shards`, and an index if there are several. Returns their names.
///
/// Other names of a tensor are where `safetensors.torch` and `huggingface_hub` put them: in the metadata of the file, or of
/// the index if there is one. A torch file has the tensor under all its names.
pub(super) fn write(
    output: &mut Output,
    source: &dyn Source,
    plan: &ExportPlan,
    shards: &[Vec<&ExportTensor>],
    format: ExportFormat,
    progress: &dyn Progress,
) -> Result<Vec<String>> {
    progress.begin("exporting", plan.bytes());
    let (stem, suffix) = format.name();
    let mut names = Vec::new();
    let mut weight_map = Map::new();
    for (index, shard) in shards.iter().enumerate() {
        let name = match shards.len() {
            1 => format!("{stem}.{suffix}"),
            count => format!("{stem}-{:05}-of-{count:05}.{suffix}", index + 1),
        };
        let tied: Vec<(String, String)> = plan
            .tied
            .iter()
            .filter(|(_, kept)| shard.iter().any(|tensor| tensor.name == *kept))
            .cloned()
            .collect();
        write_file(output, &name, source, shard, &tied, format, progress)?;
        weight_map.extend(shard.iter().map(|tensor| (tensor.name.clone(), json!(name))));
        if format == ExportFormat::Torch {
            weight_map.extend(tied.into_iter().map(|(other, _)| (other, json!(name))));
        }
        names.push(name);
    }
    if shards.len() > 1 {
        let mut metadata = Map::from_iter([("total_size".to_owned(), json!(plan.bytes()))]);
        if format == ExportFormat::Safetensors {
            metadata.extend(plan.tied.iter().map(|(other, kept)| (other.clone(), json!(kept))));
        }
        let index = json!({ "metadata": metadata, "weight_map": Value::Object(weight_map) });
        let name = format!("{stem}.{suffix}.index.json");
        output.write(&name, format!("{index:#}\n").as_bytes())?;
        names.push(name);
    }
    Ok(names)
}

fn write_file(
    output: &mut Output,
    name: &str,
    source: &dyn Source,
    tensors: &[&ExportTensor],
    tied: &[(String, String)],
    format: ExportFormat,
    progress: &dyn Progress,
) -> Result<()> {
    // The widest elements first: then each tensor starts at a multiple of its element size, without gaps.
    let mut tensors = tensors.to_vec();
    tensors.sort_by_key(|tensor| std::cmp::Reverse(tensor.dtype.size()));
    let facts: Vec<TensorFacts> = tensors
        .iter()
        .map(|it| TensorFacts { name: it.name.clone(), dtype: it.dtype, shape: it.shape.clone() })
        .collect();
    let mut file = WeightsFile::create(output, name, format, &facts, tied)?;
    for tensor in tensors {
        let mut written = 0;
        file.begin()?;
        read_tensor(source, tensor, |bytes| {
            file.bytes(bytes)?;
            written += bytes.len() as u64;
            progress.advance(bytes.len() as u64);
            Ok(())
        })?;
        file.end()?;
        if written != tensor.bytes() {
            let problem = format!("`{}` has {written} bytes instead of {}", tensor.name, tensor.bytes());
            return Err(CheckpointError::Unwritable { what: format!("file {name}"), problem });
        }
    }
    file.finish()
}
