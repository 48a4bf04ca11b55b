package cli

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"masquevpn/internal/config"
)

func TestExitCodes(t *testing.T) {
	problems := func(n int) error {
		e := &config.Error{}
		for i := range n {
			e.Problems = append(e.Problems,
				config.Problem{File: "f.toml", Line: i + 1, Key: "k", Reason: "bad"})
		}
		return e
	}
	for _, test := range []struct {
		name string
		args []string
		err  error // the command's error
		want Code
		out  string // expected standard error
	}{
		{"well", []string{"do"}, nil, OK, ""},
		{"ours", []string{"do"}, &Error{Code: Refused, Reason: "no address", Remedy: "ask"},
			Refused, "prog: no address: ask\n"},
		{"ours, wrapped", []string{"do"},
			fmt.Errorf("x: %w", &Error{Code: Identity, Reason: "who?"}), Identity, "prog: who?\n"},
		{"any", []string{"do"}, errors.New("it broke"), Failure, "prog: it broke\n"},
		{"on one line", []string{"do"}, errors.New("it\nbroke\x1b[31m"), Failure,
			"prog: it broke [31m\n"},
		{"permission", []string{"do"}, &fs.PathError{Op: "open", Path: "f", Err: unix.EACCES},
			Privileges, "prog: open f: permission denied: run as root or as the owner, or let the group of a service read it\n"},
		{"disk full", []string{"do"}, &fs.PathError{Op: "write", Path: "f", Err: unix.ENOSPC},
			Failure, "prog: write f: no space left on device: make room there (df -h), and try again\n"},
		{"read-only", []string{"do"}, &fs.PathError{Op: "open", Path: "f", Err: unix.EROFS},
			Failure, "prog: open f: read-only file system: choose another folder, or have it mounted for writing\n"},
		{"a folder", []string{"do"}, &fs.PathError{Op: "read", Path: "f", Err: unix.EISDIR}, Usage,
			"prog: read f: is a directory: name another one\n"},
		{"below a file", []string{"do"},
			fmt.Errorf("x: %w", &fs.PathError{Op: "mkdir", Path: "f", Err: unix.ENOTDIR}), Usage,
			"prog: x: mkdir f: not a directory: name another one\n"},
		{"a limit of files", []string{"do"}, &fs.PathError{Op: "write", Path: "f", Err: unix.EFBIG},
			Failure, "prog: write f: file too large\n"},
		{"one problem", []string{"do"}, problems(1), Usage, "prog: f.toml:1: k: bad\n"},
		{"two problems", []string{"do"}, problems(2), Usage,
			"f.toml:1: k: bad\nf.toml:2: k: bad\nprog: f.toml has 2 problems: correct the lines above\n"},
		{"unknown flag", []string{"do", "--nonsense"}, nil, Usage,
			"prog: unknown flag: --nonsense: see 'prog do --help'\n"},
		{"unknown command", []string{"undo"}, nil, Usage,
			"prog: unknown command \"undo\" for \"prog\": see 'prog --help'\n"},
		{"no command", nil, nil, Usage, "prog: a command is missing: see 'prog --help'\n"},
		{"an argument too many", []string{"do", "it"}, nil, Usage,
			"prog: unknown command \"it\" for \"prog do\": see 'prog do --help'\n"},
		{"log level", []string{"do", "--log-level", "loud"}, nil, Usage,
			"prog: --log-level \"loud\" is not known: write debug, info, warn or error\n"},
		{"log format", []string{"do", "--log-format", "xml"}, nil, Usage,
			"prog: --log-format \"xml\" is not known: write auto, text or json\n"},
	} {
		t.Run(test.name, func(t *testing.T) {
			root, _ := NewRoot("prog", "a program", Page{})
			root.AddCommand(&cobra.Command{Use: "do", Args: cobra.NoArgs,
				RunE: Run(func(*cobra.Command, []string) error {
					return test.err
				})})
			var stderr bytes.Buffer
			root.SetErr(&stderr)
			root.SetArgs(append([]string{}, test.args...))
			if got := Main(root); got != int(test.want) || stderr.String() != test.out {
				t.Errorf("exit code %d, want %d; said %q, want %q", got, test.want, stderr.String(),
					test.out)
			}
		})
	}
}

func TestVersionCommand(t *testing.T) {
	for _, args := range [][]string{{"version"}, {"version", "--json"}} {
		root, _ := NewRoot("prog", "a program", Page{})
		var out bytes.Buffer
		root.SetOut(&out)
		root.SetArgs(args)
		if code := Main(root); code != 0 {
			t.Fatalf("%v: exit code %d", args, code)
		}
		if len(args) == 1 {
			if !strings.HasPrefix(out.String(), "prog ") || strings.Count(out.String(), "\n") != 1 {
				t.Errorf("%v: %q", args, out.String())
			}
			continue
		}
		var v VersionInfo
		if err := json.Unmarshal(out.Bytes(), &v); err != nil || v.Program != "prog" ||
			v.Version == "" || v.Go == "" {
			t.Errorf("%v: %+v, %v", args, v, err)
		}
	}
}

func TestCompletion(t *testing.T) {
	for _, shell := range []string{"bash", "zsh", "fish", "powershell"} {
		root, _ := NewRoot("prog", "a program", Page{})
		var out bytes.Buffer
		root.SetOut(&out)
		root.SetArgs([]string{"completion", shell})
		if code := Main(root); code != 0 || !strings.Contains(out.String(), "prog") {
			t.Errorf("%s: exit code %d, %d bytes", shell, code, out.Len())
		}
	}
}

func TestManual(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "man1")
	root, _ := NewRoot("prog", "a program",
		Page{Files: []Entry{{"/etc/it's.toml", ".It is"}}, SeeAlso: []string{"other(1)"}})
	root.AddCommand(&cobra.Command{Use: "do IT", Short: "Do it",
		Run: func(*cobra.Command, []string) {}})
	root.SetArgs([]string{"man", dir})
	if code := Main(root); code != 0 {
		t.Fatalf("exit code %d", code)
	}
	for name, want := range map[string][]string{
		"prog.1": {
			".TH \"PROG\" \"1\"", "\\fBprog COMMAND [flags]\\fP\n",
			".SH COMMANDS\n.TP\n\\fBcompletion\\fP\n", ".TP\n\\fBdo\\fP\nDo it.\n",
			".SH EXIT STATUS\n.TP\n\\fB0\\fP\nWell.\n", "\\fB8\\fP\nAddress or route refused.\n",
			".SH FILES\n.TP\n\\fB/etc/it\\(aqs.toml\\fP\n\\&.It is\n", "prog-do(1)\\fP",
			", \\fBother(1)\\fP\n", "\\fB--help\\fP\n",
		},
		"prog-do.1": {".TH \"PROG-DO\"", "\\fBprog do IT [flags]\\fP", ".SH EXIT STATUS\n",
			".SH SEE ALSO\n\\fBprog(1)\\fP\n"},
	} {
		page, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		for _, s := range want {
			if !strings.Contains(string(page), s) {
				t.Errorf("no %q in %s:\n%s", s, name, page)
			}
		}
	}
	if _, err := os.Stat(filepath.Join(dir, "prog-man.1")); err == nil {
		t.Error("a page of a hidden command")
	}
}

func TestLogFormats(t *testing.T) {
	file, err := os.Create(filepath.Join(t.TempDir(), "log"))
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(file.Fd()), &st); err != nil {
		t.Fatal(err)
	}
	here := fmt.Sprintf("%d:%d", st.Dev, st.Ino)
	for _, test := range []struct {
		format, journal string
		json            bool
	}{
		{FormatAuto, "", false},
		{FormatAuto, here, true},
		{FormatAuto, "1:1", false}, // inherited; the output went elsewhere
		{FormatAuto, "nonsense", false},
		{FormatText, here, false},
		{FormatJSON, "", true},
	} {
		t.Setenv("JOURNAL_STREAM", test.journal)
		o, err := ParseLogOptions("warn", test.format)
		if err != nil {
			t.Fatal(err)
		}
		handler := o.Logger(file).Handler()
		if _, isJSON := handler.(*slog.JSONHandler); isJSON != test.json {
			t.Errorf("format %s, JOURNAL_STREAM %q: %T", test.format, test.journal, handler)
		}
		if handler.Enabled(t.Context(), slog.LevelInfo) ||
			!handler.Enabled(t.Context(), slog.LevelWarn) {
			t.Errorf("the level is not warn")
		}
	}
	o, err := ParseLogOptions("DEBUG", FormatJSON)
	if err != nil {
		t.Fatal(err)
	}
	if got := strings.Join(o.Args(), " "); got != "--log-level=debug --log-format=json" {
		t.Errorf("given on as %s", got)
	}
}

// Lines of libraries do not fill the log, and are not there at all unless asked
// for.
func TestStandardLog(t *testing.T) {
	defer log.SetFlags(log.Flags())
	defer log.SetOutput(log.Writer())
	for level, want := range map[slog.Level]int{slog.LevelInfo: 0,
		slog.LevelDebug: linesPerSecond} {
		synctest.Test(t, func(t *testing.T) {
			var buf bytes.Buffer
			StandardLog(slog.New(slog.NewTextHandler(&buf, &slog.HandlerOptions{Level: level})))
			for i := range 1000 {
				log.Printf("line %d", i)
			}
			lines := strings.Count(buf.String(), "\n")
			if lines != want || want > 0 &&
				!strings.Contains(buf.String(), `level=DEBUG msg="from a library" line="line 0"`) {
				t.Errorf("at level %v: %d lines, want %d:\n%s", level, lines, want, buf.String())
			}
		})
	}
}

func TestSecretFiles(t *testing.T) {
	path := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(path, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	root := os.Geteuid() == 0 // whose group may read
	for mode, good := range map[fs.FileMode]bool{0o600: true, 0o400: true, 0o640: root,
		0o604: false, 0o660: false, 0o644: false, 0o620: false} {
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
		data, err := ReadSecret(path)
		if good != (err == nil) || good && string(data) != "x" {
			t.Errorf("mode %o: %q, %v", mode, data, err)
		}
		if e, ok := errors.AsType[*Error](err); !good &&
			(!ok || e.Code != Usage || !strings.Contains(e.Error(), "chmod 600 "+path)) {
			t.Errorf("mode %o: %v", mode, err)
		}
	}
	if _, _, err := ReadFile(filepath.Dir(path)); !errors.Is(err, unix.EISDIR) {
		t.Errorf("a folder: %v", err)
	}
}

func TestSecretsOfServices(t *testing.T) {
	dir := t.TempDir()
	root := os.Geteuid() == 0
	for _, test := range []struct {
		mode fs.FileMode
		want fs.FileMode
	}{
		{0o700, 0o600}, {0o750, 0o600}, {0o750 | fs.ModeSetgid, 0o640},
		{0o755 | fs.ModeSetgid, 0o600}, {0o700 | fs.ModeSetgid, 0o600},
	} {
		if err := os.Chmod(dir, test.mode); err != nil {
			t.Fatal(err)
		}
		if !root {
			test.want = 0o600
		}
		if got := SecretMode(filepath.Join(dir, "f")); got != test.want {
			t.Errorf("in a folder with mode %v: %o, want %o", test.mode, got, test.want)
		}
	}
	if got := SecretMode(filepath.Join(dir, "none", "f")); got != 0o600 {
		t.Errorf("in no folder: %o", got)
	}
}

func TestKeepSecrets(t *testing.T) {
	before, err := unix.PrctlRetInt(unix.PR_GET_DUMPABLE, 0, 0, 0, 0)
	if err != nil {
		t.Fatal(err)
	}
	KeepSecrets()
	now, err := unix.PrctlRetInt(unix.PR_GET_DUMPABLE, 0, 0, 0, 0)
	if now != 0 || err != nil {
		t.Errorf("this process can be dumped: %d, %v", now, err)
	}
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, uintptr(before), 0, 0, 0); err != nil {
		t.Error(err)
	}
}

func TestWriteFiles(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "f")
	if err := CreateFile(path, []byte("one"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := CreateFile(path, []byte("two"), 0o600); !errors.Is(err, fs.ErrExist) {
		t.Errorf("over another file: %v", err)
	}
	check := func(want string, mode fs.FileMode) {
		t.Helper()
		data, err := os.ReadFile(path)
		if err != nil || string(data) != want {
			t.Errorf("holds %q, %v; want %q", data, err, want)
		}
		if info, err := os.Stat(path); err != nil || info.Mode().Perm() != mode {
			t.Errorf("mode %v, %v; want %v", info.Mode(), err, mode)
		}
		if entries, err := os.ReadDir(dir); err != nil || len(entries) != 1 {
			t.Errorf("left behind: %v, %v", entries, err)
		}
	}
	check("one", 0o600)
	if err := WriteFile(path, []byte("three"), 0o644); err != nil {
		t.Fatal(err)
	}
	check("three", 0o644)
	if err := WriteFile(filepath.Join(dir, "none", "f"), nil, 0o600); !errors.Is(err,
		fs.ErrNotExist) {
		t.Errorf("into a folder that is not there: %v", err)
	}
}

func TestLockDir(t *testing.T) {
	dir := t.TempDir()
	free := func() bool {
		d, err := os.Open(dir)
		if err != nil {
			t.Fatal(err)
		}
		defer d.Close()
		return unix.Flock(int(d.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil
	}
	unlock, err := LockDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	if free() {
		t.Error("the folder is not locked")
	}
	unlock()
	if !free() {
		t.Error("the folder stays locked")
	}
	if _, err := LockDir(filepath.Join(dir, "none")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a folder that is not there: %v", err)
	}
}

func TestOneLine(t *testing.T) {
	if got := OneLine(" a\r\nb\x1b]0;x\x07\u009bc\x7f ä "); got != "a  b ]0;x  c  ä" {
		t.Errorf("%q", got)
	}
}

func TestWords(t *testing.T) {
	for n, want := range map[uint64]string{0: "0 B", 1023: "1023 B", 1024: "1.0 KiB",
		1536: "1.5 KiB", 5 << 30: "5.0 GiB", 1<<64 - 1: "16.0 EiB"} {
		if got := Size(n); got != want {
			t.Errorf("Size(%d) = %q, want %q", n, got, want)
		}
	}
	if got := Counts(map[string]uint64{"too_big": 12, "no_route": 3,
		"queue_full": 0}); got != "3 no route, 12 too big" {
		t.Errorf("counts %q", got)
	}
}
