package acme

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"strconv"
	"time"

	"github.com/caddyserver/certmagic"
	"github.com/mholt/acmez/v3/acme"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

// renewalWindow is the remaining fraction of a certificate's lifetime at
// renewal, unless the server suggests a time (RFC 9773). Servers recommend a
// third.
const renewalWindow = 3

// errUnusable is returned for stored files that are not a certificate with its
// key, for example after a crash between the two writes.
var errUnusable = errors.New("the stored certificate cannot be used")

// keeper uses certmagic for one certificate: its files and the exchange with
// the server. Run alone decides when to renew, so certmagic's cache and
// schedule are not used.
type keeper struct {
	cfg    Config
	cache  *certmagic.Cache // empty, required by certmagic
	magic  *certmagic.Config
	issuer *certmagic.ACMEIssuer
	// renewal is the server's renewal information for the certificate with the
	// serial number below.
	renewal acme.RenewalInfo
	serial  string
	asked   time.Time
}

func newKeeper(cfg Config) *keeper {
	k := &keeper{cfg: cfg}
	logger := zap.New(logCore{LevelEnabler: zap.LevelEnablerFunc(func(zapcore.Level) bool {
		return cfg.Logger.Enabled(context.Background(), slog.LevelDebug)
	}), logger: cfg.Logger})
	k.cache = certmagic.NewCache(certmagic.CacheOptions{
		GetConfigForCert: func(certmagic.Certificate) (*certmagic.Config, error) {
			return k.magic, nil
		},
		Logger: logger,
	})
	k.magic = certmagic.New(k.cache, certmagic.Config{
		Storage: newStorage(cfg.Storage),
		OCSP:    certmagic.OCSPConfig{DisableStapling: true},
		Logger:  logger,
	})
	host, port, _ := net.SplitHostPort(cfg.Listen) // cfg.Listen is already validated
	number, _ := strconv.Atoi(port)
	k.issuer = certmagic.NewACMEIssuer(k.magic, certmagic.ACMEIssuer{
		CA: cfg.Directory, Email: cfg.Email, Agreed: true, TrustedRoots: cfg.Roots,
		DisableHTTPChallenge:    cfg.Challenge != HTTP,
		DisableTLSALPNChallenge: cfg.Challenge != TLSALPN,
		ListenHost:              host, AltHTTPPort: number, AltTLSALPNPort: number,
		Logger: logger,
	})
	k.magic.Issuers = []certmagic.Issuer{k.issuer}
	return k
}

func (k *keeper) close() { k.cache.Stop() }

// load reads the stored certificate. The error wraps fs.ErrNotExist if there is
// none, and errUnusable if the files are damaged.
func (k *keeper) load(ctx context.Context) (*tls.Certificate, error) {
	chain, err := k.magic.Storage.Load(ctx,
		certmagic.StorageKeys.SiteCert(k.issuer.IssuerKey(), k.cfg.Name))
	if err != nil {
		return nil, err
	}
	key, err := k.magic.Storage.Load(ctx,
		certmagic.StorageKeys.SitePrivateKey(k.issuer.IssuerKey(), k.cfg.Name))
	if err != nil {
		return nil, err
	}
	cert, err := tls.X509KeyPair(chain, key)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errUnusable, err)
	}
	return &cert, nil
}

// get obtains a certificate from the server and stores it with a new key. It
// renews the stored certificate or replaces damaged files.
func (k *keeper) get(ctx context.Context, renew bool) error {
	// Check the port first: otherwise the challenge would fail with an
	// unrelated reason.
	if err := CheckListen(ctx, k.cfg); err != nil {
		return err
	}
	if renew {
		return k.magic.RenewCertSync(ctx, k.cfg.Name, true)
	}
	// certmagic would keep existing files and obtain no certificate.
	if err := k.magic.Storage.Delete(ctx,
		certmagic.StorageKeys.SiteCert(k.issuer.IssuerKey(), k.cfg.Name)); err != nil {
		return err
	}
	return k.magic.ObtainCertSync(ctx, k.cfg.Name)
}

// due returns the time of renewal. It queries the server, if it supports this,
// at the interval that the server sets.
func (k *keeper) due(ctx context.Context, leaf *x509.Certificate) time.Time {
	due := leaf.NotAfter.Add(-leaf.NotAfter.Sub(leaf.NotBefore) / renewalWindow)
	if serial := leaf.SerialNumber.String(); serial != k.serial || k.renewal.NeedsRefresh() ||
		!k.renewal.HasWindow() && time.Since(k.asked) >= lookInterval {
		info, err := k.issuer.GetRenewalInfo(ctx,
			certmagic.Certificate{Certificate: tls.Certificate{Leaf: leaf}})
		if err != nil {
			k.cfg.Logger.Debug("the server suggests no time of renewal", "error", err)
		}
		if err == nil || serial != k.serial {
			k.renewal = info
		}
		k.serial, k.asked = serial, time.Now()
	}
	if at := k.renewal.SelectedTime; !at.IsZero() && at.Before(leaf.NotAfter) {
		due = at
	}
	return due
}

// httpClient returns a client for requests outside of certmagic.
func httpClient(cfg Config) *http.Client {
	transport := http.DefaultTransport.(*http.Transport).Clone()
	transport.TLSClientConfig = &tls.Config{RootCAs: cfg.Roots}
	transport.DisableKeepAlives = true
	return &http.Client{Transport: transport, Timeout: certmagic.HTTPTimeout}
}
