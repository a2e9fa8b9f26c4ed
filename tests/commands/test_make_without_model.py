"""`make serve` without a model, ended as machines end it."""

from tests.commands.test_make import check_serving, kill_ray, terminate


def test_make_serve_leaves_nothing_behind_when_it_is_terminated_or_its_ray_dies(tmp_path):
    check_serving(tmp_path, terminate, kill_ray)
