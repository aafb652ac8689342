"""The card that the Space shows: its pictures, and those of no other folder."""

import json
import subprocess
import sys
from pathlib import Path

SPACE = Path(__file__).parents[2] / "templates" / "space"
PROGRAM = """
import json, sys
from pathlib import Path
import worker
worker.tell(html=worker.card(Path(sys.argv[1])))
"""


def test_pictures_of_the_merge_are_shown_and_no_file_outside_of_it(tmp_path):
    merged = tmp_path / "merged"
    (merged / "lewis").mkdir(parents=True)
    (merged / "lewis" / "scores.png").write_bytes(b"of the merge")
    (tmp_path / "secret.png").write_bytes(b"of somebody else")
    (merged / "README.md").write_text("![a](lewis/scores.png)\n\n![b](lewis/../../secret.png)\n")

    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(merged)],
        cwd=SPACE,
        capture_output=True,
        text=True,
        check=True,
    )

    html = json.loads(done.stdout)["html"]
    assert "base64,b2YgdGhlIG1lcmdl" in html
    assert "b2Ygc29tZWJvZHkgZWxzZQ" not in html
    assert 'src="#lewis/../../secret.png"' in html
