package main

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base32"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"

	"masquevpn/internal/connectip"
)

// stateDir is the default of --state-dir, the folder of files that outlast a
// tunnel.
const stateDir = "/var/lib/masque"

// installationFile is the name of the file with the random secret of this
// installation of the client.
const installationFile = "installation"

// installation returns the token by which a proxy recognises a tunnel of this
// host. It differs for each tunnel and each proxy, so that two proxies cannot
// find out that they have a client in common.
func (o *options) installation(name, proxy string) (string, error) {
	secret, err := readInstallation(o.stateDir)
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256(bytes.Join([][]byte{secret, []byte(name), []byte(proxy)}, []byte{0}))
	return base32.StdEncoding.WithPadding(base32.NoPadding).EncodeToString(sum[:16]), nil
}

// readInstallation returns the secret of this installation. It creates the file
// if it does not exist.
func readInstallation(dir string) ([]byte, error) {
	path := filepath.Join(dir, installationFile)
	secret, err := readToken(path)
	if !errors.Is(err, fs.ErrNotExist) {
		return secret, err
	}
	if err := os.MkdirAll(dir, 0o750); err != nil {
		return nil, err
	}
	f, err := os.CreateTemp(dir, installationFile+"-") // mode 0600
	if err != nil {
		return nil, err
	}
	defer os.Remove(f.Name())
	secret = []byte(rand.Text() + "\n")
	_, err = f.Write(secret)
	// A service, which runs as the owner of the folder, reads the file too.
	if info, statErr := os.Stat(dir); statErr == nil && os.Geteuid() == 0 {
		if st, ok := info.Sys().(*syscall.Stat_t); ok {
			err = errors.Join(err, f.Chown(int(st.Uid), int(st.Gid)))
		}
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return nil, err
	}
	// If two tunnels start at once, both use the first file.
	if err := os.Link(f.Name(), path); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, err
	}
	return readToken(path)
}

// instancePath returns the name of the file in which a running tunnel keeps its
// instance token for the next run, in case it is killed.
func (o *options) instancePath(name string) string {
	return filepath.Join(o.RunDir,
		name+".instance")
}

// lastInstance returns the instance token of the last run if that was killed:
// the proxy may still have its session. Otherwise it returns a new token.
//
// No two processes use one token: the lock of the tunnel excludes it on this
// host, and run directories neither survive a restart of the host nor are
// copied to other hosts.
func (o *options) lastInstance(name string, logger *slog.Logger) string {
	path := o.instancePath(name)
	token, err := readToken(path)
	if err == nil && !connectip.IsToken(string(token)) {
		err = fmt.Errorf("%s is damaged", path)
	}
	switch {
	case err == nil:
		return string(token)
	case !errors.Is(err, fs.ErrNotExist):
		logger.Warn("the token of the last run cannot be used: if it was killed, the proxy holds its addresses for another half minute", "error", err)
	}
	return rand.Text()
}

// minToken is the minimum length of a token in bytes, too long to guess.
const minToken = 16

// readToken reads a small regular file. It does not follow symbolic links and
// does not block on a pipe.
func readToken(path string) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is not a file: remove it", path)
	}
	token, err := io.ReadAll(io.LimitReader(f, 1<<10))
	if err == nil && len(bytes.TrimSpace(token)) < minToken {
		err = fmt.Errorf("%s is damaged: remove it", path)
	}
	return token, err
}

// keepInstance writes the instance token of this run to its file. forget
// removes the file at a regular end.
func (o *options) keepInstance(name, token string, logger *slog.Logger) (forget func()) {
	path := o.instancePath(name)
	_ = os.Remove(path) // the file may belong to another user
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err == nil {
		_, err = f.WriteString(token)
		err = errors.Join(err, f.Close())
	}
	if err != nil {
		logger.Warn("the token of this run cannot be stored: if it is killed, the proxy holds its addresses for half a minute", "error", err)
	}
	return func() { _ = os.Remove(path) }
}
