"""Encoders of text, and one whose layers all share their weights (ALBERT)."""

from __future__ import annotations

from typing import Any

import torch

from tests.zoo.architecture import VOCAB, Family, ids, long_text, masked_text, text

ENCODERS = Family("encoders")
_add = ENCODERS.hf

_BERT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 80,
    "pad_token_id": 0,
}


def _characters(seed: int) -> dict[str, Any]:
    return {"input_ids": torch.randint(1000, 1100, (2, 32), generator=torch.Generator().manual_seed(seed))}


def _spans(seed: int) -> dict[str, Any]:
    entities = torch.tensor([[1, 2], [3, 4]])
    positions = torch.tensor([[[1, 2, -1], [4, -1, -1]], [[2, 3, 4], [7, 8, -1]]])
    return {"input_ids": ids(seed), "entity_ids": entities, "entity_position_ids": positions}


def _boxes(seed: int) -> dict[str, Any]:
    return {"input_ids": ids(seed), "bbox": torch.arange(4).expand(2, 11, 4) * 10}


_add("bert", "BertForMaskedLM", masked_text, **_BERT)
_add("bert, classifier", "BertForSequenceClassification", text, **_BERT)
_add("bert-generation", "BertGenerationEncoder", text, **_BERT)
_add("roberta", "RobertaForMaskedLM", text, **_BERT)
_add("roberta-prelayernorm", "RobertaPreLayerNormModel", text, **_BERT)
_add("xlm-roberta", "XLMRobertaModel", text, **_BERT)
_add("xlm-roberta-xl", "XLMRobertaXLModel", text, **_BERT)
_add("xmod", "XmodModel", text, **_BERT, languages=["en_XX"], default_language="en_XX")
_add("camembert", "CamembertForMaskedLM", text, **_BERT)
_add("deberta", "DebertaForMaskedLM", text, **_BERT, relative_attention=True, pos_att_type=["c2p", "p2c"])
_add(
    "deberta-v2", "DebertaV2ForMaskedLM", text, **_BERT, relative_attention=True, pos_att_type=["c2p", "p2c"],
    position_buckets=8, conv_kernel_size=3,
)  # fmt: skip
_add("electra", "ElectraForPreTraining", text, **_BERT, embedding_size=16)
_add("convbert", "ConvBertModel", text, **_BERT, embedding_size=16)
_add(
    "distilbert", "DistilBertForMaskedLM", text, vocab_size=VOCAB, dim=32, hidden_dim=64, n_layers=4, n_heads=4,
    max_position_embeddings=64, pad_token_id=0,
)  # fmt: skip
_add("mpnet", "MPNetForMaskedLM", text, **_BERT)
_add("xlnet", "XLNetLMHeadModel", text, vocab_size=VOCAB, d_model=32, n_layer=4, n_head=4, d_inner=64)
_add("xlm", "XLMModel", text, vocab_size=VOCAB, emb_dim=32, n_layers=4, n_heads=4, max_position_embeddings=64)
_add("longformer", "LongformerForMaskedLM", long_text, **_BERT, attention_window=8)
_add(
    "big_bird", "BigBirdForMaskedLM", long_text, **(_BERT | {"max_position_embeddings": 128}), block_size=4,
    num_random_blocks=2, attention_type="block_sparse",
)  # fmt: skip
_add("nystromformer", "NystromformerForMaskedLM", long_text, **_BERT, segment_means_seq_len=64, num_landmarks=8)
_add("fnet", "FNetForMaskedLM", text, **_BERT)
_add("squeezebert", "SqueezeBertForMaskedLM", text, **_BERT, embedding_size=32)
_add("mobilebert", "MobileBertForMaskedLM", text, **_BERT, embedding_size=32, intra_bottleneck_size=16)
_add("megatron-bert", "MegatronBertForMaskedLM", text, **_BERT)
_add("rembert", "RemBertForMaskedLM", text, **_BERT, input_embedding_size=16, output_embedding_size=48)
_add("roformer", "RoFormerForMaskedLM", text, **_BERT, embedding_size=32)
_add("ibert", "IBertForMaskedLM", text, **_BERT)
_add("ernie", "ErnieForMaskedLM", text, **_BERT)
_add("esm", "EsmForMaskedLM", text, **_BERT, position_embedding_type="rotary", token_dropout=False, mask_token_id=4)
_add("luke", "LukeModel", _spans, **_BERT, entity_vocab_size=9, entity_emb_size=16)
_add("layoutlm", "LayoutLMModel", _boxes, **_BERT)
_add("lilt", "LiltModel", _boxes, **(_BERT | {"hidden_size": 48}), channel_shrink_ratio=4)
_add("bros", "BrosModel", _boxes, **(_BERT | {"hidden_size": 64}))
_add(
    "modernbert", "ModernBertForMaskedLM", text, **_BERT, bos_token_id=1, eos_token_id=2, cls_token_id=3, sep_token_id=4
)
_add("yoso", "YosoForMaskedLM", text, **_BERT, use_expectation=True)
_add("mra", "MraForMaskedLM", text, **_BERT)
_add("data2vec-text", "Data2VecTextForMaskedLM", text, **_BERT)
_add("markuplm", "MarkupLMModel", text, **_BERT, max_depth=4, xpath_unit_hidden_size=8)
_add("tapas", "TapasModel", text, **_BERT)
_add("flaubert", "FlaubertModel", text, vocab_size=VOCAB, emb_dim=32, n_layers=4, n_heads=4, max_position_embeddings=64)
_add(
    "funnel", "FunnelModel", text, vocab_size=VOCAB, block_sizes=[2, 2], num_decoder_layers=1, d_model=32, n_head=4,
    d_head=8, d_inner=64,
)  # fmt: skip
_add(
    "canine", "CanineModel", _characters, **(_BERT | {"max_position_embeddings": 128}), num_hash_buckets=64,
    local_transformer_stride=8, downsampling_rate=2, upsampling_kernel_size=2,
)  # fmt: skip
_add("albert (shared layers)", "AlbertForMaskedLM", text, **_BERT, embedding_size=16)
_add("albert, two groups", "AlbertModel", text, **_BERT, embedding_size=16, num_hidden_groups=2, inner_group_num=2)
