//! Writing a model as safetensors files with the names and the index that the Hugging Face libraries look for.

use std::collections::HashMap;

use serde_json::{Map, Value, json};

use super::{ExportPlan, ExportTensor, read_tensor};
use crate::{
    CheckpointError, Progress, Result, Source,
    header::{self, Entry},
    output::Output,
};

/// Writes one file for each of `shards`, and an index if there are several. Returns their names.
///
/// Other names of a tensor are where `safetensors.torch` and `huggingface_hub` put them: in the metadata of the file, or of
/// the index if there is one.
pub(super) fn write(
    output: &mut Output,
    source: &dyn Source,
    plan: &ExportPlan,
    shards: &[Vec<&ExportTensor>],
    progress: &dyn Progress,
) -> Result<Vec<String>> {
    progress.begin("exporting", plan.bytes());
    let mut names = Vec::new();
    let mut weight_map = Map::new();
    for (index, shard) in shards.iter().enumerate() {
        let name = match shards.len() {
            1 => "model.safetensors".to_owned(),
            count => format!("model-{:05}-of-{count:05}.safetensors", index + 1),
        };
        let tied = plan.tied.iter().filter(|(_, kept)| shard.iter().any(|tensor| tensor.name == *kept));
        write_file(output, &name, source, shard, tied.cloned().collect(), progress)?;
        weight_map.extend(shard.iter().map(|tensor| (tensor.name.clone(), json!(name))));
        names.push(name);
    }
    if shards.len() > 1 {
        let mut metadata = Map::from_iter([("total_size".to_owned(), json!(plan.bytes()))]);
        metadata.extend(plan.tied.iter().map(|(other, kept)| (other.clone(), json!(kept))));
        let index = json!({ "metadata": metadata, "weight_map": Value::Object(weight_map) });
        let name = "model.safetensors.index.json".to_owned();
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
    tied: HashMap<String, String>,
    progress: &dyn Progress,
) -> Result<()> {
    // The widest elements first: then each tensor starts at a multiple of its element size, without gaps.
    let mut tensors = tensors.to_vec();
    tensors.sort_by_key(|tensor| std::cmp::Reverse(tensor.dtype.size()));
    let unwritable = |problem: String| CheckpointError::Unwritable { what: format!("file {name}"), problem };
    let mut entries = Vec::with_capacity(tensors.len());
    for tensor in &tensors {
        let bytes = usize::try_from(tensor.bytes()).map_err(|error| unwritable(error.to_string()))?;
        let (key, shape) = (tensor.name.clone(), tensor.shape.clone());
        entries.push(Entry { key, dtype: tensor.dtype, shape, bytes });
    }
    let header = header::build_with(&entries, tied).map_err(unwritable)?;
    let data: u64 = tensors.iter().map(|tensor| tensor.bytes()).sum();
    let mut file = output.create(name, header.len() as u64 + data)?;
    file.write(&header)?;
    for tensor in tensors {
        let mut written = 0;
        read_tensor(source, tensor, |bytes| {
            file.write(bytes)?;
            written += bytes.len() as u64;
            progress.advance(bytes.len() as u64);
            Ok(())
        })?;
        if written != tensor.bytes() {
            let problem = format!("`{}` has {written} bytes instead of {}", tensor.name, tensor.bytes());
            return Err(unwritable(problem));
        }
    }
    file.finish()
}
