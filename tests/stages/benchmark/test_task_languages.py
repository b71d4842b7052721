"""Which language the harness' names carry."""

import pytest

from congrad_ray.stages.benchmark.languages import task_language


@pytest.mark.parametrize(
    ("name", "language"),
    [
        ("belebele_deu_Latn", "de"),
        ("belebele_zho_Hans", "zh"),
        ("belebele_zho_Hant", "zh-Hant"),
        ("belebele_hin_Latn", "hi-Latn"),
        ("belebele_arb_Arab", "ar"),
        ("global_mmlu_de_business", "de"),
        ("global_mmlu_full_sw_high_school_us_history", "sw"),
        ("global_mmlu_full_de", "de"),
        ("mmmlu_pt_br_anatomy", "pt"),
        ("mmmlu_es_la_anatomy", "es"),
        ("xcopa_qu", "qu"),
        ("xnli_de", "de"),
        ("mgsm_direct_fr", "fr"),
        ("mgsm_en_cot_de", "de"),
        ("lambada_openai_mt_de", "de"),
        ("catalan_bench_flores_ca-de", "de"),
        ("flores_eng_Latn-afr_Latn_prompt_2", "af"),
        ("french_bench_arc_challenge", "fr"),
        ("include_base_44_korean_stem", "ko"),
        ("afrimmlu_direct_swa_prompt_3", "sw"),
        ("arc_vi", "vi"),
    ],
)
def test_a_name_with_a_language(name: str, language: str) -> None:
    assert task_language(name) == language


@pytest.mark.parametrize(
    "name",
    [
        "hellaswag",
        "arc_easy",
        "ai2_arc",
        "mmlu_high_school_us_history",
        "persona_willingness-to-be-non-HHH",
        "bear_big",
        "mmlu_international_law",
        "super-glue-wic",
        "tinyMMLU",
        "infinitebench_code_run",
        "gsm8k",
        "",
    ],
)
def test_a_name_without(name: str) -> None:
    assert task_language(name) is None
