// Package acme obtains and renews the certificate of one name by ACME (RFC
// 8555). Start [Manager.Run], wait for [Manager.Ready] and use
// [Manager.Certificate] in each TLS handshake.
//
// The certificate, its key and the account are files in one directory, so that
// a restart needs no new certificate. Failures are logged with a remedy and
// retried, see [Status]. This is the only package that uses certmagic.
package acme

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io/fs"
	"log/slog"
	"net"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/caddyserver/certmagic"
	"github.com/cenkalti/backoff/v5"
	"github.com/mholt/acmez/v3/acme"
)

// LetsEncrypt is the directory of Let's Encrypt.
const LetsEncrypt = certmagic.LetsEncryptProductionCA

// Challenge is the proof of control over the name.
type Challenge string

// The supported challenges. The server connects to a standard TCP port.
const (
	TLSALPN Challenge = "tls-alpn-01" // RFC 8737, port 443
	HTTP    Challenge = "http-01"     // RFC 8555 section 8.3, port 80
)

// Port returns the TCP port that the server connects to.
func (c Challenge) Port() int {
	if c == HTTP {
		return certmagic.HTTPChallengePort
	}
	return certmagic.TLSALPNChallengePort
}

// Listen returns the default address for answers to the challenge.
func (c Challenge) Listen() string { return ":" + strconv.Itoa(c.Port()) }

// Config configures a Manager. All fields but Roots are required.
type Config struct {
	// Name is the domain name or address that the certificate is for.
	Name      string
	Directory string // URL of the server's directory
	// Email is the contact of the account, for notices of the server.
	Email string
	// Roots verify the ACME server. nil: the system's roots.
	Roots     *x509.CertPool
	Challenge Challenge
	// Listen is the TCP address and port for answers to challenges. It is in
	// use only during a challenge.
	Listen string
	// Storage is the directory of the files, made if missing. Only its owner
	// can read them.
	Storage string
	Logger  *slog.Logger
}

// Delays of further attempts. They stay below common rate limits (Let's
// Encrypt: five failures of a name in an hour).
const (
	firstRetry = time.Minute
	retryGrows = 3
	lastRetry  = time.Hour
)

// lookInterval is the longest time between checks of the stored certificate and
// its renewal time.
const lookInterval = 6 * time.Hour

// Status is the state of a Manager.
type Status struct {
	// Problem is the *fault.Error of the last attempt to obtain or renew the
	// certificate; nil while there is no failure.
	Problem error
	// Next is the time of the next attempt after Problem.
	Next time.Time
}

// Manager obtains and renews one certificate while Run runs. Its methods may be
// called concurrently.
type Manager struct {
	cfg         Config
	certificate atomic.Pointer[tls.Certificate]
	ready       chan struct{}
	again       chan struct{}

	mu     sync.Mutex
	status Status
}

// New returns a Manager. Run starts its work.
func New(cfg Config) *Manager {
	return &Manager{cfg: cfg, ready: make(chan struct{}), again: make(chan struct{}, 1)}
}

// Ready returns a channel that is closed once there is a certificate.
func (m *Manager) Ready() <-chan struct{} { return m.ready }

// Certificate returns the current certificate with its Leaf; nil before Ready.
// The caller must not modify it.
func (m *Manager) Certificate() *tls.Certificate { return m.certificate.Load() }

// Status returns the failure since the last success, if any.
func (m *Manager) Status() Status {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.status
}

func (m *Manager) setStatus(s Status) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.status = s
}

// Again ends the wait after a failure, for a cause that may be gone.
func (m *Manager) Again() {
	if m.Status().Problem == nil {
		return
	}
	select {
	case m.again <- struct{}{}:
	default:
	}
}

// Run obtains and renews the certificate until ctx ends. It logs failures with
// a remedy and tries again.
func (m *Manager) Run(ctx context.Context) {
	k := newKeeper(m.cfg)
	defer k.close()
	retry := &backoff.ExponentialBackOff{
		InitialInterval: firstRetry, Multiplier: retryGrows, MaxInterval: lastRetry,
		RandomizationFactor: 0.1,
	}
	for {
		wait, err := m.maintain(ctx, k)
		if ctx.Err() != nil {
			return
		}
		if err == nil {
			retry.Reset()
			m.setStatus(Status{})
		} else {
			wait = retry.NextBackOff()
			e := explain(err, m.cfg)
			m.setStatus(Status{Problem: e, Next: time.Now().Add(wait)})
			log := m.cfg.Logger.With("name", m.cfg.Name, "error", e.Reason, "remedy", e.Remedy,
				"retry_in", wait.Round(time.Second))
			if c := m.Certificate(); c == nil {
				log.Error("no certificate yet")
			} else {
				log.Error("the certificate cannot be renewed", "certificate_until", c.Leaf.NotAfter)
			}
		}
		timer := time.NewTimer(wait)
		select {
		case <-timer.C:
		case <-m.again:
			timer.Stop()
			retry.Reset()
		case <-ctx.Done():
			timer.Stop()
			return
		}
	}
}

// maintain uses the stored certificate and renews it when due. It returns the
// time until the next check.
func (m *Manager) maintain(ctx context.Context, k *keeper) (time.Duration, error) {
	stored, err := k.load(ctx)
	if err != nil {
		if !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, errUnusable) {
			return 0, err
		}
		if err := k.get(ctx, false); err != nil {
			return 0, err
		}
		return m.obtained(ctx, k)
	}
	if time.Now().Before(stored.Leaf.NotAfter) {
		m.use(stored)
	}
	if due := k.due(ctx, stored.Leaf); time.Now().Before(due) {
		return min(time.Until(due), lookInterval), nil
	}
	if err := k.get(ctx, true); err != nil {
		return 0, err
	}
	return m.obtained(ctx, k)
}

// obtained uses the certificate that the server has just issued.
func (m *Manager) obtained(ctx context.Context, k *keeper) (time.Duration, error) {
	got, err := k.load(ctx)
	if err != nil {
		return 0, err
	}
	m.cfg.Logger.Info("certificate obtained", "name", m.cfg.Name, "issuer",
		got.Leaf.Issuer.CommonName, "certificate_until", got.Leaf.NotAfter)
	m.use(got)
	return min(max(time.Until(k.due(ctx, got.Leaf)), time.Second), lookInterval), nil
}

func (m *Manager) use(cert *tls.Certificate) {
	if m.certificate.Swap(cert) == nil {
		close(m.ready)
	}
}

// Stored returns the certificate in the storage directory, with its Leaf. The
// error wraps fs.ErrNotExist if there is none.
func Stored(ctx context.Context, cfg Config) (*tls.Certificate, error) {
	k := newKeeper(cfg)
	defer k.close()
	return k.load(ctx)
}

// CheckListen checks by listening that the challenge's address is available.
// The error is a *fault.Error.
func CheckListen(ctx context.Context, cfg Config) error {
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "tcp", cfg.Listen)
	if err != nil {
		return explainListen(err, cfg)
	}
	return l.Close()
}

// CheckDirectory fetches the server's directory and returns the URL of its
// terms of service, "" if it has none. The error is a *fault.Error.
func CheckDirectory(ctx context.Context, cfg Config) (terms string, err error) {
	client := acme.Client{Directory: cfg.Directory, HTTPClient: httpClient(cfg)}
	dir, err := client.GetDirectory(ctx)
	if err != nil {
		return "", explain(err, cfg)
	}
	if dir.Meta == nil {
		return "", nil
	}
	return dir.Meta.TermsOfService, nil
}
