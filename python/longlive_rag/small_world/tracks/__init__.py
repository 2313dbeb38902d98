"""The tracks of the memory benchmark, one file each."""

from longlive_rag.small_world.tracks.crowd import CROWD
from longlive_rag.small_world.tracks.drift import DRIFT, LONG
from longlive_rag.small_world.tracks.night import NIGHT
from longlive_rag.small_world.tracks.sprites import CUTS, PANS
from longlive_rag.small_world.tracks.track import Track

TRACKS: dict[str, Track] = {track.name: track for track in (CUTS, PANS, DRIFT, NIGHT, CROWD, LONG)}
