package qlog

import (
	"bytes"
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/quic-go/quic-go"
	http3qlog "github.com/quic-go/quic-go/http3/qlog"
	quicqlog "github.com/quic-go/quic-go/qlog"
	"github.com/quic-go/quic-go/qlogwriter"
	"github.com/quic-go/quic-go/qlogwriter/jsontext"

	"masquevpn/internal/config"
)

// bigEvent is an event with a payload of its value in bytes.
type bigEvent int

func (bigEvent) Name() string { return "big" }

func (e bigEvent) Encode(enc *jsontext.Encoder, _ time.Time) error {
	return enc.WriteToken(jsontext.String(strings.Repeat("x", int(e))))
}

// record starts the file of a connection. It returns nil for a connection that
// is not followed.
func record(t *testing.T, tracer Tracer, id byte) qlogwriter.Recorder {
	t.Helper()
	trace := tracer(t.Context(), true, quic.ConnectionIDFromBytes([]byte{id, 2, 3, 4}))
	if trace == nil {
		return nil
	}
	return trace.AddProducer()
}

// fileNames returns the names of the files in a folder.
func fileNames(t *testing.T, dir string) []string {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(dir, "*"))
	if err != nil {
		t.Fatal(err)
	}
	return names
}

func TestQlog(t *testing.T) {
	dir := t.TempDir()
	var log bytes.Buffer
	tracer, wait, err := Open(dir, slog.New(slog.NewTextHandler(&log, nil)))
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(log.String(), "level=WARN") {
		t.Errorf("no warning is logged: %s", &log)
	}
	r := record(t, tracer, 1)
	r.RecordEvent(http3qlog.FrameCreated{Frame: http3qlog.Frame{Frame: http3qlog.HeadersFrame{HeaderFields: []http3qlog.HeaderField{
		{Name: ":path", Value: "/a"}, {Name: "authorization", Value: "Bearer secret"},
		{Name: "masque-instance", Value: "secret"},
		{Name: "masque-installation", Value: "secret"},
		{Name: "proxy-authorization", Value: "secret"},
	}}}})
	r.RecordEvent(quicqlog.MTUUpdated{Value: 1400})
	names := fileNames(t, dir)
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		// the file is readable while it grows
		if text, err := os.ReadFile(names[0]); err != nil || time.Now().After(deadline) {
			t.Fatalf("%v: %s", err, text)
		} else if strings.Contains(string(text), "mtu_updated") {
			break
		}
	}
	r.Close()
	wait()
	if len(names) != 1 || !strings.HasSuffix(names[0], "Z_01020304_client.sqlog") {
		t.Fatalf("the files are %q", names)
	}
	info, err := os.Stat(names[0])
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the file is %v, %v", info, err)
	}
	text, err := os.ReadFile(names[0])
	if err != nil {
		t.Fatal(err)
	}
	records := bytes.Split(text[1:], []byte{qlogwriter.RecordSeparator})
	if len(records) != 3 {
		t.Fatalf("%d records: %s", len(records), text)
	}
	for _, record := range records {
		if !json.Valid(record) {
			t.Errorf("not JSON: %s", record)
		}
	}
	if strings.Contains(string(text), "secret") || !strings.Contains(string(text), `"/a"`) {
		t.Errorf("the header is written as %s", records[1])
	}

	if none, wait, err := Open("", nil); none != nil || wait == nil || err != nil {
		t.Errorf("without the key: %v", err)
	}
}

func TestLimits(t *testing.T) {
	dir := t.TempDir()
	for i := range maxFiles { // files of earlier runs
		if err := os.WriteFile(filepath.Join(dir, fmt.Sprintf("2001010%d_%02d.sqlog", i%2, i)), nil,
			0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "0000"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	var log bytes.Buffer
	tracer, wait, err := Open(dir, slog.New(slog.NewTextHandler(&log, nil)))
	if err != nil {
		t.Fatal(err)
	}
	var open []qlogwriter.Recorder
	for i := range maxFiles + 2 {
		if r := record(t, tracer, byte(i)); r != nil {
			open = append(open, r)
		}
	}
	if len(open) != maxFiles || strings.Count(log.String(), "more connections") != 1 {
		t.Errorf("%d connections are followed\n%s", len(open), &log)
	}
	open[0].RecordEvent(bigEvent(maxFileLen))
	open[0].RecordEvent(bigEvent(maxFileLen))
	for _, r := range open {
		r.Close()
	}
	wait()
	names := fileNames(t, dir)
	if len(names) != maxFiles+1 || filepath.Base(names[0]) != "0000" ||
		strings.Contains(names[1], "2001") {
		t.Errorf("%d files are left: %q", len(names), names)
	}
	for _, name := range names {
		if info, err := os.Stat(name); err != nil || info.Size() > maxFileLen+1000 {
			t.Errorf("%s: %v, %v", name, info, err)
		}
	}
	if r := record(t, tracer, 99); r == nil {
		t.Error("when others have ended, a new connection is not followed")
	} else {
		r.Close()
	}
	wait()
}

// A folder that cannot be written to is logged once and disturbs no connection.
// One that does not exist is an error at the start.
func TestFailures(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "qlog")
	keys, err := config.ParseClient(filepath.Join(filepath.Dir(dir), "c.toml"),
		[]byte("proxy = \"p\"\n[log]\nqlog_dir = \"qlog\"\n"))
	if err != nil {
		t.Fatal(err)
	}
	var log bytes.Buffer
	logger := slog.New(slog.NewTextHandler(&log, nil))
	if _, _, err := Open(keys.QlogDir, logger); err == nil ||
		!strings.Contains(keys.Locate(err).Error(), `c.toml:3: log.qlog_dir = "qlog": `) ||
		!strings.Contains(keys.Locate(err).Error(),
			"no such file or directory; name a folder that can be written to: mkdir -m 700 "+dir) {
		t.Errorf("without the folder: %v", err)
	}
	if err := os.WriteFile(dir, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, _, err := Open(keys.QlogDir, logger); err == nil ||
		!strings.Contains(err.Error(), "not a directory") {
		t.Errorf("a file in its place: %v", err)
	}
	if err := os.Remove(dir); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	tracer, _, err := Open(keys.QlogDir, logger)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(dir); err != nil {
		t.Fatal(err)
	}
	for i := range 2 {
		if r := record(t, tracer, byte(i)); r != nil {
			t.Error("there is a file in a folder that was removed")
		}
	}
	if n := strings.Count(log.String(), "level=ERROR"); n != 1 {
		t.Errorf("%d errors are logged:\n%s", n, &log)
	}

	q := &folder{logger: logger}
	full, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	q.open = 1
	q.files.Add(1)
	log.Reset()
	file := &file{folder: q, file: full, w: newBuffer(full)}
	for range 3 {
		if n, err := file.Write(make([]byte, 1<<17)); n != 1<<17 || err != nil {
			t.Errorf("a full disk gives %d, %v", n, err)
		}
	}
	if err := file.Close(); err != nil || strings.Count(log.String(), "no space left") != 1 {
		t.Errorf("a full disk: %v\n%s", err, &log)
	}
}
