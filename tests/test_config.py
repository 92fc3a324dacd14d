import pytest

from perpixel.config import Config, dump, merge, nearest, override, parse, read_yaml
from perpixel.errors import ConfigError


class Inner(Config):
    rate: float = 0.1
    sides: tuple[int, ...] = (3, 4)


class Outer(Config):
    inner: Inner = Inner()
    maybe: Inner | None = None
    name: str = "x"


def test_unknown_keys_name_the_nearest_known_one() -> None:
    with pytest.raises(ConfigError, match=r"my\.yaml: unknown key 'inner\.rat'; did you mean 'rate'\?"):
        parse(Outer, {"inner": {"rat": 1}}, "my.yaml")
    with pytest.raises(ConfigError, match=r"unknown key 'maybe\.zzz'; known: rate, sides"):
        parse(Outer, {"maybe": {"zzz": 1}}, "my.yaml")


def test_all_mistakes_are_told_at_once_with_what_came() -> None:
    with pytest.raises(ConfigError) as error:
        parse(Outer, {"inner": {"rate": "fast"}, "nam": 3}, "my.yaml")
    assert "inner.rate" in str(error.value)
    assert "got 'fast'" in str(error.value)
    assert "did you mean 'name'?" in str(error.value)


def test_overrides_reach_into_sections_and_read_yaml_values() -> None:
    data = override({"inner": {"rate": 0.1}}, ["inner.rate=2", "inner.sides=[1, 2]", "maybe.rate=3e-3", "name=a=b"])
    assert parse(Outer, data, "").model_dump() == {
        "inner": {"rate": 2.0, "sides": (1, 2)},
        "maybe": {"rate": 0.003, "sides": (3, 4)},
        "name": "a=b",
    }


def test_an_override_may_switch_a_section_off() -> None:
    assert parse(Outer, override({"maybe": {"rate": 1}}, ["maybe=null"]), "").maybe is None


@pytest.mark.parametrize("wrong", ["rate", "=3", "a..b=3", "a=[1"])
def test_malformed_overrides_are_refused(wrong) -> None:
    with pytest.raises(ConfigError, match="override"):
        override({}, [wrong])


def test_a_dumped_config_reads_back_equal(tmp_path) -> None:
    config = Outer(inner=Inner(rate=0.5), name="ä")
    (tmp_path / "c.yaml").write_text(dump(config), encoding="utf-8")
    assert parse(Outer, read_yaml(tmp_path / "c.yaml"), "c.yaml") == config


@pytest.mark.parametrize("text", ["a: [1", "- 1\n- 2\n", "\x00"])
def test_files_that_hold_no_mapping_are_refused(tmp_path, text) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"c\.yaml"):
        read_yaml(tmp_path / "c.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_yaml(tmp_path / "absent.yaml")


def test_merging_replaces_lists_and_joins_sections() -> None:
    assert merge({"a": {"b": 1, "c": [1]}, "d": 1}, {"a": {"c": [2, 3]}, "d": {"e": 1}}) == {
        "a": {"b": 1, "c": [2, 3]},
        "d": {"e": 1},
    }


def test_a_name_like_none_lists_what_is_known() -> None:
    assert nearest("qqqq", ["beta", "alpha"]) == "known: alpha, beta"
