"""What the names in a stack mean: images and volumes of a state directory as plain directories."""

from polytropo.compose import Dir, Fault, Image, Layer, StackError, Union, Volume
from polytropo.errors import PolytropoError
from polytropo.host import host_ownership
from polytropo.state import State


def resolve(root: Layer, state: State | None, tenant_name: str | None) -> Layer:
    """`root` without `Image` and `Volume`. Raises StackError that names the place of an unknown one."""
    return _Resolver(state or State.open(), tenant_name).layer(root, "root")


class _Resolver:
    def __init__(self, state: State, tenant_name: str | None) -> None:
        self._state = state
        self._tenant_name = tenant_name

    def layer(self, layer: Layer, place: str) -> Layer:
        match layer:
            case Dir():
                return layer
            case Volume():
                return self._volume(layer, place)
            case Image():
                dirs = self._image(layer, place)
                return dirs[0] if len(dirs) == 1 else Union(dirs)
            case Fault():
                return Fault(self.layer(layer.below, f"{place}.below"), layer.rules, layer.seed)
            case Union():
                return self._union(layer, place)

    def _union(self, union: Union, place: str) -> Union:
        lowers: list[Layer] = []
        for i, lower in enumerate(union.lowers):
            where = f"{place}.lowers[{i}]"
            # An image's layers join the union, so that there is one union and not two.
            lowers += self._image(lower, where) if isinstance(lower, Image) else [self.layer(lower, where)]
        upper = None if union.upper is None else self.layer(union.upper, f"{place}.upper")
        return Union(lowers, upper)

    def _image(self, image: Image, place: str) -> list[Dir]:
        from polytropo.lifecycle import image_hooks

        hooks = image_hooks()
        if hooks is None:
            raise StackError(place, f"images cannot be mounted yet: {image.name}")
        try:
            return hooks.layers(self._state, image.name)
        except PolytropoError as error:
            raise _at(place, error) from error

    def _volume(self, volume: Volume, place: str) -> Dir:
        from polytropo.tenants import get_tenant
        from polytropo.volumes import get_volume, volume_data

        try:
            tenant = get_tenant(self._state, self._tenant_name)
            get_volume(self._state, tenant.name, volume.name)
        except PolytropoError as error:
            raise _at(place, error) from error
        path = volume_data(self._state, tenant.name, volume.name)
        # Also where it is only read: both are shown from one filesystem, so readers see what is written.
        return Dir(path, read_only=volume.read_only, coherence="exclusive", ownership=host_ownership())


def _at(place: str, error: PolytropoError) -> PolytropoError:
    # A stack that is one name needs no place.
    return error if place == "root" else StackError(place, error.sentence)
