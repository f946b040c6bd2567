"""Presets of one's own: registering them by name, and restoring them from a saved name, config and types."""

from dataclasses import dataclass, replace

import jax
import pytest
from tiny_preset import TinyMLP

import imaml
from imaml import InputError
from imaml.settings.published_presets import restore


@dataclass(frozen=True)
class Layers:
    """A record inside the network's record."""

    widths: tuple[int, ...] = (3, 3)


@dataclass(frozen=True)
class OwnNetwork(TinyMLP):
    """A network record with a function and another record as fields."""

    activation: object = jax.nn.relu
    layers: Layers = Layers()


OWN = replace(imaml.preset("glyphs-5way-1shot-gd"), name="own", network=OwnNetwork())


def saved(preset):
    """Return what a run's folder holds of a preset: its name, its config and its types."""
    return preset.name, preset.config(), preset.types()


def test_a_registered_preset_is_found_listed_and_replaced():
    first = imaml.presets()
    imaml.register_preset(OWN)
    assert imaml.presets() == (*first, "own") and imaml.preset("own") is OWN
    imaml.register_preset(replace(OWN, strength=3.0))
    assert imaml.preset("own").strength == 3.0 and imaml.presets() == (*first, "own")
    with pytest.raises(InputError, match=r"there is no preset 'owm': did you mean own\?"):
        imaml.preset("owm")


def test_what_cannot_be_registered_is_refused():
    with pytest.raises(InputError, match="the name 'glyphs-5way-1shot-gd' is taken by a preset of this package"):
        imaml.register_preset(imaml.preset("glyphs-5way-1shot-gd"))
    with pytest.raises(InputError, match=r"only an imaml\.Preset can be registered, got 'own'"):
        imaml.register_preset("own")
    with pytest.raises(InputError, match="a preset needs a name"):
        imaml.register_preset(replace(OWN, name=""))


def test_a_preset_with_parts_of_ones_own_types_is_restored_once_it_is_registered():
    trained = replace(OWN, strength=0.7, network=OwnNetwork(hidden=9, layers=Layers((5,))))
    with pytest.raises(InputError, match=r"network is .*OwnNetwork"):
        restore(*saved(trained))
    imaml.register_preset(OWN)
    restored = restore(*saved(trained))
    assert restored == trained and restored.network.activation is jax.nn.relu
    assert restored.types() == trained.types()


def test_a_part_with_another_function_or_another_type_inside_is_refused():
    imaml.register_preset(OWN)
    name, config, types = saved(OWN)
    other = config | {"network": config["network"] | {"activation": "jax.numpy.tanh"}}
    with pytest.raises(InputError, match=r"activation was jax\.numpy\.tanh and is .*relu now"):
        restore(name, other, types)
    with pytest.raises(InputError, match=r"has a type that imaml does not define \(network\.layers is mine\.Layers\)"):
        restore(name, config, types | {"network.layers": "mine.Layers"})
    with pytest.raises(InputError, match=r"\(preset is mine\.Preset\)"):
        restore(name, config, types | {"preset": "mine.Preset"})


def test_a_registered_preset_does_not_change_how_a_part_of_this_package_is_restored():
    conv4 = replace(imaml.preset("glyphs-5way-1shot-gd"), name="own")
    imaml.register_preset(OWN)
    assert restore(*saved(conv4)) == conv4
