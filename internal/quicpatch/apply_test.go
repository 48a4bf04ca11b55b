package quicpatch

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// apply runs apply.sh at the top of the repository.
func apply(t *testing.T, args ...string) (output string, err error) {
	t.Helper()
	cmd := exec.Command("internal/quicpatch/apply.sh", args...)
	cmd.Dir = "../.."
	out, err := cmd.CombinedOutput()
	return string(out), err
}

func TestPatchesApply(t *testing.T) {
	folder := filepath.Join(t.TempDir(), "build")
	if out, err := apply(t, folder); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, file := range []string{"go.mod", "go.sum", "quic-go/datagram_handlers.go",
		"quic-go/internal/congestion/optional.go"} {
		if _, err := os.Stat(filepath.Join(folder, file)); err != nil {
			t.Error(err)
		}
	}
	out, err := exec.Command("gofmt", "-l", filepath.Join(folder, "quic-go")).Output()
	if err != nil || len(out) > 0 {
		t.Errorf("not formatted: %s %v", out, err)
	}
}

// A patch that does not apply is named, and nothing remains that could be
// built.
func TestPatchThatDoesNotApply(t *testing.T) {
	patches := t.TempDir()
	const patch = "--- a/config.go\n+++ b/config.go\n@@ -1,2 +1,2 @@\n-no such line\n+another line\n nor this one\n"
	if err := os.WriteFile(filepath.Join(patches, "0001-wrong.patch"), []byte(patch),
		0o600); err != nil {
		t.Fatal(err)
	}
	folder := filepath.Join(t.TempDir(), "build")
	out, err := apply(t, folder, patches)
	if err == nil || !strings.Contains(out, "0001-wrong.patch does not apply") {
		t.Errorf("got %v and %q, want a failure that names the patch", err, out)
	}
	if _, err := os.Stat(folder); !os.IsNotExist(err) {
		t.Errorf("the folder is still there: %v", err)
	}
}

// Each patch begins with a header that explains it.
func TestPatchesHaveHeaders(t *testing.T) {
	files, err := filepath.Glob("patches/*.patch")
	if err != nil || len(files) == 0 {
		t.Fatal("no patches", err)
	}
	for _, file := range files {
		t.Run(filepath.Base(file), func(t *testing.T) {
			text, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			header, _, found := strings.Cut(string(text), "diff --git ")
			if !found || len(strings.TrimSpace(header)) < 80 {
				t.Errorf("the header is %q, want at least 80 characters", header)
			}
		})
	}
}
