"""The images of a study in their folder."""

from guidance_interval.tune.images import Images
from guidance_interval.tune.servers.backend import Job, Rendered, Setting
from tune_harness import Painter


def test_an_image_that_is_damaged_or_of_another_job_is_rendered_again(tmp_path):
    folder, job = Images(tmp_path), Job(Setting(0.1, 2.0, 3.0), "a", 1)
    folder.put((0, 0), job, Rendered(Painter().paint(job), 9.0, 0.5))
    found = folder.get((0, 0), job)
    assert (found.rows, found.seconds) == (9.0, 0.5) and found.image.tobytes() == Painter().paint(job).tobytes()
    assert folder.get((0, 0), Job(job.setting, "b", 1)) is None and folder.get((0, 1), job) is None
    file = folder.file(job.setting, (0, 0))
    file.write_bytes(file.read_bytes()[:-30])
    assert folder.get((0, 0), job) is None
