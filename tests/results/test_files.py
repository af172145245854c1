"""A set of files is written whole or not at all."""

import pytest

from igseg.results.files import write_files
from integrated_gradients import OutputError


def test_a_set_of_files_is_written_whole_or_not_at_all(tmp_path):
    marker, data = tmp_path / 'done.json', tmp_path / 'data.bin'
    write_files({data: lambda p: p.write_text('old'), marker: lambda p: p.write_text('old')})

    def disk_full(path):
        path.write_text('half')
        raise OSError(28, 'No space left on device')

    with pytest.raises(OutputError, match=r'done\.json: No space left on device'):
        write_files({data: lambda p: p.write_text('new'), marker: disk_full})
    assert data.read_text() == marker.read_text() == 'old'
    assert sorted(p.name for p in tmp_path.iterdir()) == ['data.bin', 'done.json']


def test_an_interruption_between_renames_leaves_no_marker(tmp_path, monkeypatch):
    marker, data = tmp_path / 'done.json', tmp_path / 'data.bin'
    write_files({data: lambda p: p.write_text('old'), marker: lambda p: p.write_text('old')})

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr('igseg.results.files.os.replace', killed)
    with pytest.raises(KeyboardInterrupt):
        write_files({data: lambda p: p.write_text('new'), marker: lambda p: p.write_text('new')})
    assert not marker.exists()
