package daemon

import (
	"bytes"
	"crypto/tls"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"masquevpn/internal/config"
)

func TestKeyLog(t *testing.T) {
	dir := t.TempDir()
	keys, err := config.ParseClient(filepath.Join(dir, "c.toml"),
		[]byte("proxy = \"p\"\n[log]\nkey_log = \"keys\"\n"))
	if err != nil {
		t.Fatal(err)
	}
	var log bytes.Buffer
	logger := slog.New(slog.NewTextHandler(&log, nil))
	c := new(tls.Config)
	closeLog, err := openKeyLog(keys.KeyLog, c, logger)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.KeyLogWriter.Write([]byte("secret")); err != nil {
		t.Error(err)
	}
	closeLog()
	info, err := os.Stat(filepath.Join(dir, "keys"))
	if err != nil || info.Mode().Perm() != 0o600 || info.Size() != 6 {
		t.Errorf("the file is %v, %v", info, err)
	}
	if !strings.Contains(log.String(), "level=WARN") {
		t.Errorf("no warning is logged: %s", &log)
	}

	// An existing file may be readable by others.
	if err := os.Chmod(filepath.Join(dir, "keys"), 0o644); err != nil {
		t.Fatal(err)
	}
	if closeLog, err = openKeyLog(keys.KeyLog, c, logger); err != nil {
		t.Fatal(err)
	}
	closeLog()
	if info, err := os.Stat(filepath.Join(dir, "keys")); err != nil ||
		info.Mode().Perm() != 0o600 || info.Size() != 6 {
		t.Errorf("a file that was 0644 is %v, %v", info, err)
	}

	_, err = openKeyLog(filepath.Join(dir, "none", "keys"), c, logger)
	if err == nil || !strings.Contains(keys.Locate(err).Error(),
		`c.toml:3: log.key_log = "keys": `) {
		t.Errorf("a file that cannot be made: %v", err)
	}
	none := new(tls.Config)
	closeLog, err = openKeyLog("", none, logger)
	if err != nil || none.KeyLogWriter != nil {
		t.Errorf("without the key: %v, %v", none.KeyLogWriter, err)
	}
	closeLog()
}
