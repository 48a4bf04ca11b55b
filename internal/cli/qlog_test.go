package cli

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
	"github.com/quic-go/quic-go/qlog"
	"github.com/quic-go/quic-go/qlogwriter"
	"github.com/quic-go/quic-go/qlogwriter/jsontext"

	"masquevpn/internal/config"
)

// bigEvent is an event of so many bytes.
type bigEvent int

func (bigEvent) Name() string { return "big" }

func (e bigEvent) Encode(enc *jsontext.Encoder, _ time.Time) error {
	return enc.WriteToken(jsontext.String(strings.Repeat("x", int(e))))
}

// qlogOf starts the qlog of a connection; nil if it is not followed.
func qlogOf(t *testing.T, tracer Tracer, id byte) qlogwriter.Recorder {
	t.Helper()
	trace := tracer(t.Context(), true, quic.ConnectionIDFromBytes([]byte{id, 2, 3, 4}))
	if trace == nil {
		return nil
	}
	return trace.AddProducer()
}

// qlogFiles returns the names of the files in a folder.
func qlogFiles(t *testing.T, dir string) []string {
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
	tracer, wait, err := OpenQlog(nil, dir, slog.New(slog.NewTextHandler(&log, nil)))
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(log.String(), "level=WARN") {
		t.Errorf("no warning is logged: %s", &log)
	}
	r := qlogOf(t, tracer, 1)
	r.RecordEvent(http3qlog.FrameCreated{Frame: http3qlog.Frame{Frame: http3qlog.HeadersFrame{HeaderFields: []http3qlog.HeaderField{
		{Name: ":path", Value: "/a"}, {Name: "authorization", Value: "Bearer secret"},
		{Name: "masque-instance", Value: "secret"},
		{Name: "masque-installation", Value: "secret"},
		{Name: "proxy-authorization", Value: "secret"},
	}}}})
	r.RecordEvent(qlog.MTUUpdated{Value: 1400})
	names := qlogFiles(t, dir)
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		// it can be read meanwhile
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

	if none, wait, err := OpenQlog(nil, "", nil); none != nil || wait == nil || err != nil {
		t.Errorf("without the key: %v", err)
	}
}

func TestQlogLimits(t *testing.T) {
	dir := t.TempDir()
	for i := range maxQlogs { // files of earlier runs
		if err := os.WriteFile(filepath.Join(dir, fmt.Sprintf("2001010%d_%02d.sqlog", i%2, i)), nil,
			0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "0000"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	var log bytes.Buffer
	tracer, wait, err := OpenQlog(nil, dir, slog.New(slog.NewTextHandler(&log, nil)))
	if err != nil {
		t.Fatal(err)
	}
	var open []qlogwriter.Recorder
	for i := range maxQlogs + 2 {
		if r := qlogOf(t, tracer, byte(i)); r != nil {
			open = append(open, r)
		}
	}
	if len(open) != maxQlogs || strings.Count(log.String(), "more connections") != 1 {
		t.Errorf("%d connections are followed\n%s", len(open), &log)
	}
	open[0].RecordEvent(bigEvent(maxQlogBytes))
	open[0].RecordEvent(bigEvent(maxQlogBytes))
	for _, r := range open {
		r.Close()
	}
	wait()
	names := qlogFiles(t, dir)
	if len(names) != maxQlogs+1 || filepath.Base(names[0]) != "0000" ||
		strings.Contains(names[1], "2001") {
		t.Errorf("%d files are left: %q", len(names), names)
	}
	for _, name := range names {
		if info, err := os.Stat(name); err != nil || info.Size() > maxQlogBytes+1000 {
			t.Errorf("%s: %v, %v", name, info, err)
		}
	}
	if r := qlogOf(t, tracer, 99); r == nil {
		t.Error("when others have ended, a new connection is not followed")
	} else {
		r.Close()
	}
	wait()
}

// What cannot be written disturbs nobody and is said once; a folder that is not
// there is an error at the start.
func TestQlogFailures(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "qlog")
	keys, err := config.ParseClient(filepath.Join(filepath.Dir(dir), "c.toml"),
		[]byte("proxy = \"p\"\n[log]\nqlog_dir = \"qlog\"\n"))
	if err != nil {
		t.Fatal(err)
	}
	var log bytes.Buffer
	logger := slog.New(slog.NewTextHandler(&log, nil))
	if _, _, err := OpenQlog(keys, keys.QlogDir, logger); err == nil ||
		!strings.Contains(err.Error(), `c.toml:3: log.qlog_dir = "qlog": `) ||
		!strings.Contains(err.Error(),
			"no such file or directory; name a folder that can be written to: mkdir -m 700 "+dir) {
		t.Errorf("without the folder: %v", err)
	}
	if err := os.WriteFile(dir, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, _, err := OpenQlog(keys, keys.QlogDir, logger); err == nil ||
		!strings.Contains(err.Error(), "not a directory") {
		t.Errorf("a file in its place: %v", err)
	}
	if err := os.Remove(dir); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	tracer, _, err := OpenQlog(keys, keys.QlogDir, logger)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(dir); err != nil {
		t.Fatal(err)
	}
	for i := range 2 {
		if r := qlogOf(t, tracer, byte(i)); r != nil {
			t.Error("there is a file in a folder that was removed")
		}
	}
	if n := strings.Count(log.String(), "level=ERROR"); n != 1 {
		t.Errorf("%d errors are logged:\n%s", n, &log)
	}

	q := &qlogs{logger: logger}
	full, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	q.open = 1
	q.files.Add(1)
	log.Reset()
	file := &qlogFile{qlogs: q, file: full, w: newQlogBuffer(full)}
	for range 3 {
		if n, err := file.Write(make([]byte, 1<<17)); n != 1<<17 || err != nil {
			t.Errorf("a full disk gives %d, %v", n, err)
		}
	}
	if err := file.Close(); err != nil || strings.Count(log.String(), "no space left") != 1 {
		t.Errorf("a full disk: %v\n%s", err, &log)
	}
}
