"""TensorBoard's event files, read back."""

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def scalars_in(folder):
    """Tag -> values, in all event files below a folder."""
    scalars = {}
    for file in sorted(folder.rglob("events*")):
        events = EventAccumulator(str(file)).Reload()
        for tag in events.Tags()["scalars"]:
            scalars.setdefault(tag, []).extend(event.value for event in events.Scalars(tag))
    return scalars
