"""`MasterModels`: the models that one master serves, each with a cluster client of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from xllm.client.cluster import ClusterClient
from xllm.client.gate_wire import UNCHECKED, ServedModel

MAX_MODELS = 32  # Chosen: each holds a tokenizer for as long as the master lives


@dataclass(slots=True, eq=False)
class MasterModel:
    """One model. cluster: of the instances that serve it. names: those under which they do, the first is shown.
    fingerprint: None until an instance has joined, `UNCHECKED` until one has that knows it. fault: why it cannot be
    served here."""

    cluster: ClusterClient
    names: dict[str, None] = field(default_factory=dict)
    fingerprint: str | None = None
    fault: str | None = None

    @property
    def is_served(self) -> bool:
        """Whether an instance of it is there."""
        return bool(self.cluster.members.all)

    def __str__(self) -> str:
        return f"{', '.join(self.names)} ({self.fingerprint or 'not checked'})"


class MasterModels:
    """Models are told apart by their fingerprints, and no two have a name in common. Once nobody serves a model any
    more, another one with a name of it takes its place: it was upgraded. An instance without a fingerprint is of the
    model that has a name of its: whoever started the master said so. `all` has one from the beginning.

    make_cluster(): for another model. only_by: the setting because of which there is one model and no other.
    """

    def __init__(self, make_cluster: Callable[[], ClusterClient], *, only_by: str | None = None):
        self._make_cluster, self._only_by = make_cluster, only_by
        self.all = [MasterModel(make_cluster())]

    def find(self, served: ServedModel) -> MasterModel:
        """Where an instance that serves this belongs: a new one is in `all` only after `note`. Raises ValueError: it
        cannot be used now."""
        same = next((one for one in self.all if one.fingerprint == served.fingerprint != UNCHECKED), None)
        namesakes = [one for one in self.all if not one.names.keys().isdisjoint(served.names)]
        if same is None and len(namesakes) == 1 and UNCHECKED in (served.fingerprint, namesakes[0].fingerprint):
            same = namesakes[0]
        rivals = [one for one in self.all if one is not same and not one.names.keys().isdisjoint(served.names)]
        fingerprint = served.fingerprint or "not checked"
        it = f"it serves {', '.join(served.names)} (fingerprint {fingerprint}), and this master "
        if len(rivals) > 1 or (rivals and (same is not None or rivals[0].is_served)):
            raise ValueError(it + ", ".join(map(str, rivals)))
        for one in self.all:
            if one is not same and (taken := set(one.cluster.adapters).intersection(served.names)):
                raise ValueError(f"{it}{one}, of which {min(taken)} is an adapter")
        if (found := same or (rivals[0] if rivals else None)) is not None:
            if found is same and found.fault is not None:
                raise ValueError(found.fault)
            return found
        if self.all[0].fingerprint is None:
            return self.all[0]
        if self._only_by is not None:
            raise ValueError(f"{it}{self.all[0]}: one model a master with {self._only_by}")
        if len(self.all) == MAX_MODELS:
            raise ValueError(f"{it}{MAX_MODELS} other models, which is as many as one may")
        return MasterModel(self._make_cluster())

    def note(self, model: MasterModel, served: ServedModel) -> bool:
        """An instance that serves this has joined its cluster. Returns whether it is another model than before."""
        is_known = model.fingerprint is not None and UNCHECKED in (model.fingerprint, served.fingerprint)
        is_new = not is_known and served.fingerprint != model.fingerprint
        model.names = dict.fromkeys((*(() if is_new else model.names), *served.names))
        model.fingerprint = served.fingerprint or model.fingerprint or UNCHECKED
        if is_new:
            model.fault = None
        if model not in self.all:
            self.all.append(model)
        return is_new
