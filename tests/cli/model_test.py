"""`mlm model`: presets by family, and what one needs, on screens of 100 columns and as JSON."""

import json

import pytest

from mlm.cli import main


def shown(capsys, *arguments):
    assert main.main(["model", *arguments]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 100
    return text


def test_the_list_names_families_and_sizes(capsys):
    lines = {line.split()[0]: line for line in shown(capsys, "list").splitlines() if line.strip()}
    assert "XLM-R" in lines["xlm_r_base"]
    assert "278,295,186" in lines["xlm_r_base"]
    assert "42+26" in lines["t5gemma_9b_2b"]


def test_the_list_as_a_record_tells_all_parameters_from_those_that_a_token_meets(capsys):
    records = {record["name"]: record for record in json.loads(shown(capsys, "list", "--json"))}
    dense, sparse = records["t5_base"], records["switch_base_128"]
    assert (dense["family"], sparse["family"]) == ("T5", "Switch")
    assert dense["active_parameters"] == dense["parameters"] == 222_903_552
    # One expert of 128 in every other of 24 layers is T5's own network; what is more are 12 routers of 768 x 128.
    assert sparse["active_parameters"] == 222_903_552 + 12 * 768 * 128
    assert sparse["parameters"] == sparse["active_parameters"] + 12 * 127 * 2 * 768 * 3072


def test_a_preset_says_its_parameters_and_what_a_device_holds(capsys):
    text = shown(capsys, "show", "mt5_small", "--mesh", "fsdp=8", "--optimizer", "adamw")
    assert "300,176,768 parameters" in text
    # 300,176,768 x 4 bytes / 8 = 150.1 MB, but for the position tables that stay whole; two moments of that size.
    assert "150MB" in text
    assert "300MB" in text
    assert "--batch" in text


def test_long_layers_are_wrapped(capsys):
    text = shown(capsys, "show", "t5gemma_9b_2b")
    assert "layers 1, 3, …" in text
    assert "attention paths: plain, blockwise, splash\n" in text  # cuDNN knows no soft cap


def test_the_record_holds_memory_flops_and_plan(capsys):
    record = json.loads(shown(capsys, "show", "xlm_r_base", "--lengths", "256", "--json"))
    assert record["parameters"] == record["active_parameters"] == sum(record["parts"].values()) == 278_295_186
    assert record["family"] == "XLM-R"
    assert record["lengths"] == {"encoder": 256}
    assert record["training_flops_per_token"] * 256 == pytest.approx(record["training_flops_per_sequence"])
    assert record["memory"]["state"]["parameters"] == 4 * 278_295_186
    assert "step" not in record["memory"]
    assert record["plan"]["head"]["mlm_transform"]


def test_a_batch_compiles_a_step_for_devices_of_the_mesh(capsys):
    arguments = "show tiny --mesh fsdp=4,tensor=2 --optimizer adamw --batch 8 --lengths 16,8 --remat minimal"
    text = shown(capsys, *arguments.split())
    assert "each of 8 devices (fsdp=4, tensor=2), adamw, float32 masters, 8 rows" in text
    assert "XLA:CPU's estimate" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("show mt5_smal", "did you mean 'mt5_small'"),
        ("show tiny --mesh fdsp=2", "no axis 'fdsp'; did you mean 'fsdp'"),
        ("show tiny --mesh fsdp=3", "embed=128 does not divide over fsdp=3"),
        ("show switch_base_8 --mesh data=2,expert=3", "experts=8 does not divide over expert=3"),
        ("show tiny --lengths 512", "give both, as 512,114"),
        ("show tiny --optimizer adam", "no optimizer named 'adam'; did you mean 'adamw'"),
        ("show tiny --remat ful", "did you mean 'full'"),
        ("show tiny --mesh data=2 --batch 3", "batch=3 does not divide over data=2"),
        ("show xlm_r_base --batch 8", "no objective trains an encoder alone"),
    ],
)
def test_nonsense_is_a_usage_error(capsys, arguments, message):
    assert main.main(["model", *arguments.split()]) == 2
    assert message in capsys.readouterr().err


def test_malformed_numbers_show_how_they_are_written(capsys):
    for flag, example in (("--mesh=fsdp", "fsdp=8,tensor=2"), ("--lengths=1,2,3", "512,114")):
        with pytest.raises(SystemExit):
            main.main(["model", "show", "tiny", flag])
        assert f"is not like {example}" in capsys.readouterr().err
