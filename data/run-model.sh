#!/bin/sh
# A small model with its own weights reads a real text on 2 ranks: from paragraphs to embeddings,
# verified. `make run-model` calls it; so may you: sh data/run-model.sh MODEL_FOLDER [OUT_FOLDER]
set -eu
cd "$(dirname "$0")/.."

model=$1
out=${2:-out}
mkdir -p "$out"
. data/launch.sh

say "The paragraphs of the Apache license, packed into sequences of 512 tokens, through"
say "all-MiniLM-L6-v2, a BERT of 6 layers: one embedding a paragraph."
say
cp LICENSE "$out/license.txt"
say "\$ mdattn convert $out/license.txt $out/tokens.h5 --cut paragraph --pack 512 \\"
say "    --tokenizer $model --overwrite"
mdattn convert "$out/license.txt" "$out/tokens.h5" --cut paragraph --pack 512 \
    --tokenizer "$model" --overwrite
run_job "$out/embeddings.log" "$out/tokens.h5" --model "$model" \
    --give last_hidden_state,embedding -b cpu -o "$out/embeddings.h5" --overwrite
say "\$ mdattn verify $out/embeddings.h5 --model $model"
mdattn verify "$out/embeddings.h5" --model "$model"

cat <<END

That was: each sequence shared by 2 MPI ranks, all layers of the model on each rank's
own tokens, attention over all of them; and the same in one process, in float32, with
the model's own attention. docs/models.md goes on from here.
END
